"""BEFT: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import bert, llama, t5

LAWS = [{}]
PEFT = {
    "decoder without biases": (llama, {}),
    "encoder": (bert, {}),
    "encoder-decoder": (t5, {}),
}
# it cannot merge into a layer without a bias; here the layer gets one
PEFT_DOES_NOT_MERGE = [{}]
