"""PEANuT: what the laws and the comparison with PEFT try. PEFT sets it into nn.Linear alone."""

from tests.methods.bases import bert, llama, t5

LAWS = [{"r": 3}, {"r": 2, "depth": 2, "act_fn": "tanh", "scaling": 0.5}]
PEFT = {
    "decoder": (llama, {"r": 4, "scaling": 8.0, "target_modules": ["q_proj", "down_proj"]}),
    "encoder, deep": (
        bert,
        {
            "r": 4,
            "depth": 2,
            "act_fn": "gelu",
            "scaling": 8.0,
            "target_modules": ["query", "dense"],
        },
    ),
    "encoder-decoder": (t5, {"r": 4, "depth": 1, "target_modules": ["q", "wo"]}),
}
