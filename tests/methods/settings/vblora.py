"""VB-LoRA: what the laws and the comparison with PEFT try of it.

Of an adapter with save_only_topk_weights PEFT takes the last weight as 1 less the others, and its
logarithm: where rounding brings that below 0 its layer computes NaN; here it is 0. PEFT makes the
bank anew at every layer; only the last one counts.
"""

from tests.methods.bases import bert, gpt2, llama, t5

SMALL = {"num_vectors": 16, "vector_length": 8}
LAWS = [
    {"r": 3, "num_vectors": 7, "vector_length": 1},
    {"r": 3, "num_vectors": 6, "vector_length": 2, "topk": 3},
]
PEFT = {
    "decoder": (llama, {**SMALL, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "decoder, top vectors alone": (
        llama,
        {
            **SMALL,
            "topk": 3,
            "save_only_topk_weights": True,
            "target_modules": ["q_proj", "up_proj"],
        },
    ),
    "encoder, top vectors alone": (
        bert,
        {
            "num_vectors": 300,
            "vector_length": 4,
            "r": 2,
            "save_only_topk_weights": True,
            "target_modules": ["query", "dense"],
        },
    ),
    "Conv1D": (gpt2, {**SMALL, "topk": 1, "fan_in_fan_out": True}),
    "encoder-decoder": (t5, {**SMALL, "bias": "vblora_only", "target_modules": ["q", "wo"]}),
}
