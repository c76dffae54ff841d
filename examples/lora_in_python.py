"""Train a LoRA in plain torch: inlay gives the model, the loop is yours."""

import torch

import inlay
from inlay import LoraConfig, PeftModel, get_peft_model


def main() -> None:
    """Teach the embedded base one sentence, save the adapter, load it and merge it."""
    torch.manual_seed(0)
    base, tokenizer = inlay.load_base()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.print_trainable_parameters()

    tokens = tokenizer("An inlay is a small precious part.", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.3f}")

    model.save_pretrained("my-adapter")
    again = PeftModel.from_pretrained(inlay.load_base()[0], "my-adapter").eval()
    with torch.no_grad():
        adapted = again(input_ids=tokens).logits
        merged = again.merge_and_unload()(input_ids=tokens).logits
    print(f"largest difference after merging: {(adapted - merged).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
