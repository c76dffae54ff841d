"""DEFT: what the laws and the comparison with PEFT try of it.

Not PEFT's para, which has no start that changes nothing.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [
    {"r": 3, "bias": "deft_only"},
    {"r": 2, "decomposition_method": "qr", "alpha": 5},
    {"r": 2, "para": True},
]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (
        bert,
        {
            "r": 4,
            "decomposition_method": "qr",
            "alpha": 8,
            "bias": "deft_only",
            "target_modules": ["query", "dense"],
        },
    ),
    "Conv1D": (gpt2, {"r": 4, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {"r": 4, "target_modules": ["q", "wo"]}),
}
