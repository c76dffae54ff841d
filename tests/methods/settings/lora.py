"""LoRA: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import bert, gpt2, llama, t5, vit

LAWS = [
    {},
    {"bias": "lora_only", "r": 3},
    {"use_rslora": True, "lora_alpha": 3, "r": 2},
    {"use_dora": True, "r": 2},
    {"use_dora": True, "bias": "lora_only", "r": 2},
]
PEFT = {
    "plain": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "DoRA": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA on Conv1D": (gpt2, {"r": 4, "use_dora": True, "fan_in_fan_out": True}),
    "DoRA on an encoder": (bert, {"r": 4, "use_dora": True, "use_rslora": True}),
    "DoRA on an encoder-decoder": (t5, {"r": 4, "use_dora": True}),
    "DoRA on a conv": (vit, {"r": 4, "target_modules": ["projection"], "use_dora": True}),
    "DoRA on an embedding": (
        llama,
        {"r": 4, "target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    ),
}
