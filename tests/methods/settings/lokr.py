"""LoKr: what the laws and the comparison with PEFT try of it. PEFT has no transformers' Conv1D.

Its forward leaves padding_mode out; vit's patches have no padding. Of a Conv1d whose M is whole,
PEFT's product mixes the places of the kernel with the channels. That is then what its files mean,
and kept (tests/methods/test_lycoris.py).
"""

from tests.methods.bases import bert, llama, t5, vit

LAWS = [
    {"r": 1, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True},
    {"r": 1, "decompose_factor": 1, "rank_dropout": 0.5, "module_dropout": 0.5},
    {"r": 8, "decompose_factor": 2},
]
PEFT = {
    "decoder": (
        llama,
        {
            "r": 2,
            "alpha": 32,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 8},
            "alpha_pattern": {"0.self_attn.q_proj": 64},
        },
    ),
    "encoder, both factored": (
        bert,
        {
            "r": 2,
            "alpha": 64,
            "decompose_both": True,
            "decompose_factor": 8,
            "target_modules": ["query", "dense"],
        },
    ),
    "encoder-decoder": (
        t5,
        {
            "r": 4,
            "alpha": 32,
            "decompose_factor": 4,
            "rank_dropout_scale": True,
            "target_modules": ["q", "wo"],
        },
    ),
    "conv": (vit, {"r": 2, "alpha": 64, "target_modules": ["projection", "q_proj"]}),
    "conv, the kernel apart": (
        vit,
        {
            "r": 1,
            "alpha": 500,
            "decompose_factor": 1,
            "use_effective_conv2d": True,
            "init_weights": "lycoris",
            "target_modules": ["projection"],
        },
    ),
}
