"""TinyLoRA: what the laws and the comparison with PEFT try of it.

Not init_weights=False, which in PEFT leaves v as the memory was: here it is drawn. A second adapter
of a layer draws its P in PEFT from the layer's number in the first adapter; here from its own.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"r": 2, "u": 3}, {"r": 9, "u": 5}]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "decoder, drawn again": (
        llama,
        {
            "u": 13,
            "weight_tying": 0.6,
            "save_projection": False,
            "projection_seed": 5,
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        },
    ),
    "embedding": (llama, {"r": 50, "target_modules": ["embed_tokens", "v_proj"]}),
    "encoder": (bert, {"r": 4, "weight_tying": 1.0, "target_modules": ["query", "dense"]}),
    "Conv1D": (gpt2, {"u": 64, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {"r": 4, "target_modules": ["q", "wo"]}),
}
