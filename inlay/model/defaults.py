"""Which modules a LoRA goes to when the user names none, by transformers' `model_type`: PEFT's choice, the q and v projections."""

from __future__ import annotations

_BY_NAME: dict[str, list[str]] = {
    "q_proj v_proj": (
        "bart gemma gemma2 gemma3 gemma3_text gpt_neo gptj llama llama4 mistral mixtral olmo olmo2 opt qwen2 qwen2_moe "
        "qwen3 qwen3_moe smollm3 stablelm cohere cohere2 granite clip clip_text_model clip_vision_model whisper"
    ).split(),
    "query value": "bert electra layoutlm roberta vit xlm-roberta distilbert albert".split(),
    "query_key_value": "bloom chatglm falcon gpt_neox".split(),
    "query_proj value_proj": ["deberta-v2"],
    "c_attn": ["gpt2", "gpt_bigcode"],
    "qkv_proj": ["codegen", "phi3"],
    "q_proj v_proj fc1 fc2": ["phi"],
    "q v": ["t5", "mt5", "umt5"],
    "in_proj": ["deberta"],
    "Wqkv": ["mpt"],
}

TARGETS: dict[str, list[str]] = {m: names.split() for names, ms in _BY_NAME.items() for m in ms}
"""model_type -> target_modules."""

HEADS: dict[str, list[str]] = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
"""task_type -> the heads that are new for the task, and so train in full and are saved with the adapter."""

UNREACHABLE = {"MultiheadAttention": ("out_proj",), "MambaMixer": ("out_proj", "conv1d")}
"""Class of a parent -> children whose weight it reads past their forward: an adapter there would silently do nothing."""
