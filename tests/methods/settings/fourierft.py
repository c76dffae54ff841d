"""FourierFT: what the laws and the comparison with PEFT try of it.

PEFT takes no seed of None, which its annotation allows.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [
    {"n_frequency": 7, "scaling": 9, "bias": "fourier_only"},
    {"n_frequency": 30, "scaling": 5, "random_loc_seed": 0},
]
PEFT = {
    "decoder": (
        llama,
        {"n_frequency": 300, "init_weights": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "numbers by layer": (
        llama,
        {
            "n_frequency": 200,
            "n_frequency_pattern": {"down_proj": 1536, "layers.1.self_attn.v_proj": 10},
            "random_loc_seed": 5,
            "target_modules": ["v_proj", "down_proj"],
        },
    ),
    "encoder": (bert, {"n_frequency": 500, "bias": "fourier_only", "scaling": 300.0}),
    "Conv1D": (gpt2, {"n_frequency": 500, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {"n_frequency": 100, "target_modules": ["q", "wo"]}),
}
