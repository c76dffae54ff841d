"""Super-Tuning: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import bert, llama, t5

LAWS = [{"sparsity": 0.8}, {"sparsity": 0.9, "select_top": False, "r": 2}]
PEFT = {
    "decoder": (llama, {"sparsity": 0.95, "target_modules": ["q_proj", "down_proj"]}),
    "decoder, with a LoRA": (llama, {"sparsity": 0.9, "r": 3, "target_modules": ["v_proj"]}),
    "encoder, places found again": (
        bert,
        {
            "save_precomputed_indices": False,
            "select_top": False,
            "sparsity": 0.5,
            "target_modules": ["query", "value", "dense"],
        },
    ),
    "encoder-decoder": (t5, {"sparsity": 0.5, "r": 2, "lora_alpha": 3, "target_modules": ["q"]}),
}
