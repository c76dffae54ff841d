"""OFT: what the laws and the comparison with PEFT try of it.

A convolution is compared where its kernel is one place: over a larger one PEFT turns patches that
overlap and adds them up, which is not what it merges (tests/methods/test_oft.py compares the merged
weights). PEFT composes two active adapters in one order and merges them in the other, takes the
divisor nearest to a block size that does not fit, never applies module_dropout, and has no GPT-2.
"""

from typing import Any

from transformers import ViTConfig, ViTForImageClassification

from tests.methods.bases import SMALL, bert, llama, t5

LAWS = [
    # few powers: of numbers as large as the laws take, more are sums of what is much larger
    {"oft_block_size": 3, "bias": "oft_only", "num_cayley_neumann_terms": 2},
    {"oft_block_size": 2, "use_cayley_neumann": False},
    {"oft_block_size": 0, "r": 2, "block_share": True, "num_cayley_neumann_terms": 2},
    {"oft_block_size": 0, "r": 1, "coft": True, "eps": 0.3},
]


def pixels() -> Any:
    """Return a vision encoder whose patches are single pixels."""
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=1, **sizes))


PEFT = {
    "decoder": (llama, {"oft_block_size": 8, "target_modules": ["q_proj", "down_proj"]}),
    "exact": (
        bert,
        {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False, "bias": "oft_only"},
    ),
    "shared and constrained": (
        t5,
        {
            "oft_block_size": 16,
            "block_share": True,
            "coft": True,
            "eps": 0.5,
            "num_cayley_neumann_terms": 3,
            "target_modules": ["q", "wo"],
        },
    ),
    "constrained, exact": (
        llama,
        {"oft_block_size": 4, "coft": True, "eps": 0.5, "use_cayley_neumann": False},
    ),
    "conv": (pixels, {"oft_block_size": 3, "target_modules": ["projection"]}),
    "embedding": (llama, {"oft_block_size": 8, "target_modules": ["embed_tokens", "v_proj"]}),
}
