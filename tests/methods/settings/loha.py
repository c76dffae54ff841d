"""LoHa: what the laws and the comparison with PEFT try of it. PEFT has no transformers' Conv1D.

Its padding_mode is left out in PEFT's forward; vit's patches have no padding.
"""

from tests.methods.bases import bert, llama, t5, vit

LAWS = [
    {"r": 2, "alpha": 5},
    {"r": 2, "use_effective_conv2d": True, "rank_dropout": 0.5, "module_dropout": 0.5},
]
PEFT = {
    "decoder": (
        llama,
        {
            "r": 4,
            "alpha": 32,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"0.self_attn.q_proj": 64},
        },
    ),
    "encoder": (bert, {"r": 4, "alpha": 32, "target_modules": ["query", "dense"]}),
    "encoder-decoder": (t5, {"r": 4, "alpha": 32, "target_modules": ["q", "wo"]}),
    "conv": (vit, {"r": 4, "alpha": 32, "target_modules": ["projection", "q_proj"]}),
    "conv, the kernel apart": (
        vit,
        {"r": 4, "alpha": 2000, "use_effective_conv2d": True, "target_modules": ["projection"]},
    ),
}
