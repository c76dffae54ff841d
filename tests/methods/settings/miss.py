"""MiSS: what the laws and the comparison with PEFT try of it.

PEFT sets it into nn.Linear alone, so there is no GPT-2 here. In training, PEFT's form bat forgets
the dropout; here it has it.
"""

from tests.methods.bases import bert, llama, t5

LAWS = [
    {"r": 4, "bias": "MiSS_only"},
    {"r": 1, "init_weights": "bat"},
    {"r": 2, "mini_r": 5, "init_weights": "mini"},
]
PEFT = {
    "decoder": (llama, {"r": 8, "target_modules": ["q_proj", "down_proj"]}),
    "rows left over": (llama, {"r": 7, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (bert, {"r": 4, "bias": "MiSS_only", "target_modules": ["query", "value"]}),
    "encoder-decoder, bat": (t5, {"r": 4, "init_weights": "bat", "target_modules": ["q", "wo"]}),
    "decoder, bat": (
        llama,
        {"r": 8, "init_weights": "bat", "target_modules": ["v_proj", "up_proj"]},
    ),
    "encoder, mini": (bert, {"r": 4, "mini_r": 8, "init_weights": "mini"}),
}
