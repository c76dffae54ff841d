"""LLaMA-Adapter: what the comparison with PEFT tries of it; the laws' bare layers are not its.

PEFT adds the bias of the output projection a second time, takes the number of query heads to one of
keys from widths (wrong where heads * head_dim is not the model's width), and ignores GPT-2's own
scales: `tests/methods/test_adaption_prompt.py` has what is right.
"""

from tests.methods.bases import gpt2, llama


def mistral():
    """Return a decoder of another name and the same attention."""
    from transformers import MistralConfig, MistralForCausalLM

    from tests.methods.bases import SMALL

    return MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=1, head_dim=8))


LAWS = [{"adapter_len": 3, "adapter_layers": 1}]
PEFT = {
    "grouped heads": (llama, {"adapter_len": 3, "adapter_layers": 1}),
    "every layer": (mistral, {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"}),
    "Conv1D": (gpt2, {"adapter_len": 3, "adapter_layers": 2, "target_modules": "attn"}),
}
