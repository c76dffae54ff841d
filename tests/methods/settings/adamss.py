"""AdaMSS: what the laws and the comparison with PEFT try of it. PEFT sets it into nn.Linear alone.

A file does not say which row of a weight is in which group: the singular vectors and the groups are
found again at loading, here as in PEFT, which asks scikit-learn. Where r reaches a weight's rows,
these are all equally far from each other, and rounding alone decides: that is not compared. PEFT
fails where the rank of a group is above r, and where a group is empty.
"""

from tests.methods.bases import bert, llama, t5, vit

LAWS = [{"r": 3, "num_subspaces": 2}, {"r": 9, "num_subspaces": 3, "subspace_rank": 2}]
PEFT = {
    "decoder": (llama, {"r": 16, "target_modules": ["q_proj", "down_proj"]}),
    "encoder, ranks as found": (
        bert,
        {
            "r": 8,
            "num_subspaces": 3,
            "subspace_rank": 4,
            "use_dynamic_rank": True,
            "svd_threshold": 0.3,
            "target_modules": ["query", "dense"],
        },
    ),
    "vision encoder": (
        vit,
        {
            "r": 6,
            "num_subspaces": 7,
            "subspace_rank": 2,
            "random_seed": 3,
            "target_modules": ["q_proj", "v_proj"],
        },
    ),
    "encoder-decoder": (t5, {"r": 8, "subspace_rank": 3, "target_modules": ["q", "wo"]}),
}
