"""C3A: what the laws and the comparison with PEFT try of it.

PEFT sets it into nn.Linear alone, so there is no GPT-2 here. Its second of two active adapters is
fed what the first one computed; here, as in its own merged weights, each is fed x
(tests/methods/test_c3a.py).
"""

from tests.methods.bases import bert, llama, t5

LAWS = [{"block_size": 1, "bias": "c3a_only"}, {"block_size": 2}, {"block_size": 4}]
PEFT = {
    "decoder": (
        llama,
        {"block_size": 8, "init_weights": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "blocks of other sizes": (
        llama,
        {
            "block_size": 4,
            "block_size_pattern": {"down_proj": 16},
            "target_modules": ["q_proj", "down_proj"],
        },
    ),
    "encoder": (
        bert,
        {"block_size": 1, "bias": "c3a_only", "init_weights": "gaussian"},
    ),
    "encoder-decoder": (
        t5,
        {"block_size": 2, "init_weights": False, "target_modules": ["q", "wo"]},
    ),
}
