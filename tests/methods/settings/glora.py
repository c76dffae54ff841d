"""GLoRA: what the laws and the comparison with PEFT try of it. PEFT sets it into nn.Linear alone.

Its files carry zeros of full size for the parts that a layer has not, and so do ours.
"""

from tests.methods.bases import bert, llama, t5

LAWS = [
    {"r": 2},
    {"r": 2, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant"},
]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (bert, {"r": 4}),
    "encoder, vectors": (
        bert,
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    ),
    "encoder, bias alone": (bert, {"config_A_B": "none", "target_modules": ["dense", "query"]}),
    "encoder-decoder": (t5, {"r": 4, "config_A_B": "constant", "target_modules": ["q", "wo"]}),
}
