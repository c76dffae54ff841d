"""LoRA: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import bert, gpt2, llama, t5, vit

LAWS = [
    {},
    {"bias": "lora_only", "r": 3},
    {"use_rslora": True, "lora_alpha": 3, "r": 2},
    {"use_dora": True, "r": 2},
    {"use_dora": True, "bias": "lora_only", "r": 2},
    {"lora_bias": True, "bias": "lora_only", "r": 2, "lora_alpha": 3},
    {"use_qalora": True, "qalora_group_size": 2, "r": 2},
    {"use_bdlora": {"target_modules_bd_a": [""], "nblocks": 2}, "r": 2, "lora_alpha": 2},
    {"use_bdlora": {"match_strict": False}, "r": 2, "lora_alpha": 2},
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
    "a bias of its own": (bert, {"r": 4, "lora_bias": True, "lora_alpha": 16, "bias": "all"}),
    "a bias of its own on Conv1D": (gpt2, {"lora_bias": True, "fan_in_fan_out": True}),
    "a bias of its own on a conv": (
        vit,
        {"r": 4, "target_modules": ["projection"], "lora_bias": True},
    ),
    "BD-LoRA": (
        llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "use_bdlora": {
                "target_modules_bd_a": ["q_proj"],
                "target_modules_bd_b": ["down_proj"],
                "nblocks": 2,
            },
        },
    ),
}
