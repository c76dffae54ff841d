"""HRA: what the laws and the comparison with PEFT try of it.

Not apply_GS beside PEFT: there pairs of equal vectors are made orthogonal, which leaves rounding
errors for the half of them (tests/methods/test_hra.py compares it once trained). Nor a convolution
whose sides differ, or with a dilation: PEFT takes the first number of kernel, padding and stride
for all sides, and leaves dilation and padding_mode out.
"""

from tests.methods.bases import bert, llama, t5, vit

LAWS = [{"r": 3, "bias": "hra_only"}, {"r": 2, "apply_GS": True}]
PEFT = {
    "decoder": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "encoder": (bert, {"r": 6, "bias": "hra_only", "target_modules": ["query", "dense"]}),
    "encoder-decoder": (t5, {"r": 2, "target_modules": ["q", "wo"]}),
    "conv": (vit, {"r": 4, "target_modules": ["projection", "q_proj"]}),
}
