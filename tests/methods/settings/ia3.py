"""IA3: what the laws and the comparison with PEFT try of it."""

from tests.methods.bases import bert, gpt2, llama, t5, vit

LAWS = [{}, {"feedforward_modules": ".*"}]
PEFT = {
    "usual targets of a decoder": (llama, {}),
    "Conv1D": (gpt2, {"fan_in_fan_out": True}),
    "encoder": (bert, {"task_type": "SEQ_CLS"}),
    "encoder-decoder": (t5, {}),
    "conv": (vit, {"target_modules": ["projection"], "feedforward_modules": []}),
    "inputs of a conv": (
        vit,
        {"target_modules": ["projection"], "feedforward_modules": ["projection"]},
    ),
}
