"""SHiRA: what the laws and the comparison with PEFT try of it.

PEFT sets it into nn.Linear alone. Without a random_seed it draws the same places in every layer of
one size and every run, since it makes a fresh generator that it never seeds; here they differ.
"""

from tests.methods.bases import bert, llama, t5

LAWS = [{"r": 1, "random_seed": 1}]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (bert, {"r": 2, "random_seed": 3, "target_modules": ["query", "dense"]}),
    "encoder-decoder": (t5, {"r": 4, "target_modules": ["q", "wo"]}),
}
