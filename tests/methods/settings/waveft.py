"""WaveFT: what the laws and the comparison with PEFT try of it.

PEFT accepts db11 to db38, sym11 to sym20, coif4 to coif17. Of these it has taps for coif4 and coif5
only, which are not orthogonal (tests/methods/test_waveft.py); with the others it cannot compute.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [
    {"n_frequency": 7, "scaling": 3, "bias": "waveft_only", "wavelet_family": "sym4"},
    {"n_frequency": 9, "scaling": 3},
    {"n_frequency": 8, "scaling": 3, "use_idwt": False, "proportional_parameters": True},
]
PEFT = {
    "decoder": (llama, {"n_frequency": 300, "target_modules": ["q_proj", "down_proj"]}),
    "numbers by layer": (
        llama,
        {
            "n_frequency": 200,
            "n_frequency_pattern": {"down_proj": 1536, "layers.1.self_attn.v_proj": 10},
            "random_loc_seed": 5,
            "wavelet_family": "coif2",
            "target_modules": ["v_proj", "down_proj"],
        },
    ),
    "numbers by size": (
        llama,
        {
            "n_frequency": 200,
            "proportional_parameters": True,
            "wavelet_family": "sym5",
            "target_modules": ["v_proj", "down_proj"],
        },
    ),
    "encoder": (bert, {"n_frequency": 500, "bias": "waveft_only", "wavelet_family": "db3"}),
    "Conv1D": (gpt2, {"n_frequency": 500, "fan_in_fan_out": True, "wavelet_family": "db10"}),
    "encoder-decoder": (
        t5,
        {"n_frequency": 100, "use_idwt": False, "target_modules": ["q", "wo"]},
    ),
}
