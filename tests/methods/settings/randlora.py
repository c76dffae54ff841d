"""RandLoRA: what the laws and the comparison with PEFT try of it.

PEFT repeats A and B under every layer of a file, and pairs columns of B with rows of A in another
order than the paper's; both are its format, and kept. A second adapter of a model gets the first
one's A and B in PEFT, whatever its rank says; here every adapter has its own. PEFT draws in
bfloat16, and in float16 on a GPU without it, so that there save_projection=False means other
numbers; here it is bfloat16 everywhere.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"r": 2}]
PEFT = {
    "decoder": (
        llama,
        {"r": 6, "randlora_alpha": 12, "target_modules": ["q_proj", "k_proj", "down_proj"]},
    ),
    "decoder, drawn again": (
        llama,
        {
            "r": 8,
            "randlora_alpha": 8,
            "save_projection": False,
            "projection_prng_key": 5,
            "target_modules": ["v_proj", "up_proj"],
        },
    ),
    "sparse, drawn again": (
        llama,
        {"r": 8, "randlora_alpha": 8, "save_projection": False, "sparse": True},
    ),
    "very sparse, drawn again": (
        llama,
        {"r": 8, "randlora_alpha": 8, "save_projection": False, "very_sparse": True},
    ),
    "encoder": (bert, {"r": 4, "randlora_alpha": 8, "target_modules": ["query", "dense"]}),
    "Conv1D": (gpt2, {"r": 8, "randlora_alpha": 8, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {"r": 4, "randlora_alpha": 8, "target_modules": ["q", "wo"]}),
}
