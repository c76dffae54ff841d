"""Several adapters in one model: switch between them, mix them in one batch, turn them off."""

import torch

import inlay
from inlay import LoraConfig, get_peft_model


def main() -> None:
    """Show that a row answers to the adapter it is given, whatever its neighbors are given."""
    torch.manual_seed(0)
    base, tokenizer = inlay.load_base()
    # With init_lora_weights=False an adapter is random, not zero: here, so that the two differ.
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="formal")
    model.add_adapter("casual", config)
    model.eval()

    tokens = tokenizer("Good morning", return_tensors="pt")["input_ids"]
    alone = {}
    with torch.no_grad():
        for name in ("formal", "casual"):
            model.set_adapter(name)
            alone[name] = model(input_ids=tokens).logits
        with model.disable_adapter():
            alone["__base__"] = model(input_ids=tokens).logits

        names = ["casual", "__base__", "formal"]
        mixed = model(input_ids=tokens.repeat(3, 1), adapter_names=names).logits
    for name, row in zip(names, mixed, strict=True):
        torch.testing.assert_close(row, alone[name][0])
        print(f"{name}: the same in the mixed batch as alone")


if __name__ == "__main__":
    main()
