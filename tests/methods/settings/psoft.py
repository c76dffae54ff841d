"""PSOFT: what the laws and the comparison with PEFT try of it. PEFT sets it into nn.Linear alone.

A file holds R alone: the singular vectors, whose signs are a choice of the solver's, are found
again at loading. On the same machine they come out the same here and in PEFT.
"""

from tests.methods.bases import bert, llama, t5

LAWS = [
    {"r": 3},
    {"r": 2, "psoft_orth": False, "psoft_mag_a": False},
    {"r": 3, "use_cayley_neumann": True, "cayley_neumann_eps": 0.9},
]
PEFT = {
    "decoder": (llama, {"r": 8, "target_modules": ["q_proj", "down_proj"]}),
    "encoder, powers": (
        bert,
        {
            "r": 8,
            "use_cayley_neumann": True,
            "cayley_neumann_eps": 0.5,
            "psoft_alpha": 4,
            "ab_svd_init": "pissa_init",
            "target_modules": ["query", "dense"],
        },
    ),
    "decoder, no turn": (llama, {"r": 8, "psoft_orth": False, "psoft_mag_b": False}),
    "encoder-decoder": (t5, {"r": 4, "psoft_svd": "lowrank", "target_modules": ["q", "wo"]}),
}
