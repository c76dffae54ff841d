"""A training loop of one's own by the fast paths of `inlay train`: two lines more."""

import torch

import inlay
from inlay import LoraConfig, get_peft_model


def main() -> None:
    """Train one adapter by the plain layers and one by the fast paths, and compare the losses."""
    losses = {}
    for is_fast in (False, True):
        torch.manual_seed(0)
        base, tokenizer = inlay.load_base()
        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
        ids = tokenizer("An inlay is a small precious part.", return_tensors="pt")["input_ids"]
        losses[is_fast] = train(model, {"input_ids": ids, "labels": ids}, is_fast)
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-3)
    for plain, fast in zip(losses[False], losses[True], strict=True):
        print(f"loss {plain:.4f} by the plain layers, {fast:.4f} by the fast paths")


def train(model: inlay.PeftModel, batch: dict[str, torch.Tensor], is_fast: bool) -> list[float]:
    """Return the losses of five steps on `batch`."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    paths = inlay.fast(model) if is_fast else None
    losses = []
    for _ in range(5):
        loss = inlay.causal_lm_loss(model, batch) if is_fast else model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if paths is not None:
        print(paths)  # how much of the model is fast
        paths.remove()
    return losses


if __name__ == "__main__":
    main()
