"""OSF: what the laws and the comparison with PEFT try of it.

PEFT computes with the first active adapter alone where several are active, and unmerges none.
"""

from tests.methods.bases import bert, llama, t5

LAWS = [{"effective_rank": 2}]
PEFT = {
    "decoder": (llama, {"effective_rank": 8, "target_modules": ["q_proj", "down_proj"]}),
    "decoder, ranks by layer": (
        llama,
        {
            "effective_rank": 0.75,
            "rank_pattern": {"up_proj": 4, "layers.1.*k_proj": 0.25},
            "target_modules": ["up_proj", "k_proj"],
        },
    ),
    "encoder": (bert, {"target_modules": ["query", "value", "dense"]}),
    "encoder-decoder": (t5, {"effective_rank": 0.9, "target_modules": ["k", "q"]}),
}
