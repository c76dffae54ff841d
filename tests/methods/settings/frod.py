"""FRoD: what the laws and the comparison with PEFT try of it.

PEFT puts U L V^T in the weight's place, which at the start is the weight but for rounding; here
only the change is added. PEFT finds U before it reads a file's V, so that its U may not fit that V
where another machine found it; here U is found for the V of the file. Of the two layers of one role
and number that an encoder-decoder has, PEFT lets only the decoder's weight count for V: kept, for
files that do not hold V.
"""

from tests.methods.bases import bert, gpt2, llama, t5

LAWS = [{"sparse_rate": 0.1}, {"sparse_rate": 0.0}]
PEFT = {
    "decoder": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "decoder, found again": (
        llama,
        {
            "sparse_rate": 0.2,
            "save_projection": False,
            "projection_prng_key": 5,
            "target_modules": ["v_proj", "up_proj"],
        },
    ),
    "encoder": (bert, {"sparse_rate": 0.05, "target_modules": ["query", "dense"]}),
    "Conv1D": (gpt2, {"sparse_rate": 0.0, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {"bias": "frod_only", "target_modules": ["q", "wo"]}),
}
