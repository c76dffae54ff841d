"""Which modules an adapter goes to when the user names none, by transformers' `model_type`.

PEFT's choice where it has one: the query and value projections of attention.
"""

from __future__ import annotations

from collections.abc import Mapping

_BY_NAMES: dict[str, str] = {
    "q_proj v_proj": (
        "bart gemma gemma2 gemma3 gemma3_text gpt_neo gptj llama llama4 mistral mixtral olmo olmo2 "
        "opt qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm cohere cohere2 granite clip "
        "clip_text_model clip_vision_model whisper"
    ),
    "query value": "bert electra layoutlm roberta xlm-roberta albert",
    # the layers' names depend on the version of transformers
    "q_proj v_proj query value": "vit",
    "q_lin v_lin": "distilbert",
    "query_key_value": "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    "query_proj value_proj": "deberta-v2",
    "c_attn": "gpt2 gpt_bigcode",
    "c_proj c_attn": "btlm",
    "qkv_proj": "codegen phi3",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "q v": "t5 mt5 umt5",
    "q v q_proj v_proj": "blip-2",
    "in_proj": "deberta",
    "Wqkv": "mpt",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}

TARGETS: dict[str, list[str] | str] = {
    **{kind: names.split() for names, kinds in _BY_NAMES.items() for kind in kinds.split()},
    # the text's part alone: the layers of the other towers are called the same
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
"""model_type -> target_modules, of which those that the model has are meant."""

_GATED = (
    "llama llama4 mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text olmo olmo2 smollm3 stablelm "
    "cohere cohere2 granite"
)
_BOTTLENECKS: dict[str, tuple[str, str, str]] = {
    # the layers that attention and MLP end with, before the residual sum, and the MLP's block
    **dict.fromkeys(_GATED.split(), ("o_proj", "down_proj", "mlp")),
    "phi3": ("o_proj", "down_proj", "mlp"),
    "gpt2": ("attn.c_proj", "mlp.c_proj", "mlp"),
    **dict.fromkeys(("t5", "mt5", "umt5"), ("o", "wo", "DenseReluDense")),
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "electra", "layoutlm"),
        ("output.dense", r".*layer\.\d+\.output\.dense", ""),
    ),
    **dict.fromkeys(("opt", "bart"), ("out_proj", "fc2", "")),
    "distilbert": ("out_lin", "ffn.lin2", "ffn"),
    "gpt_neox": ("attention.dense", "dense_4h_to_h", "mlp"),
}

TARGETS_OF: Mapping[str, Mapping[str, list[str] | str]] = {
    # all that attention and the feed-forward part have, where PEFT's table does not say less
    "ADALORA": TARGETS
    | {kind: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"] for kind in ("bart", "opt")}
    | {
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "roberta": ["query", "key", "value", "dense"],
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    },
    "BEFT": {
        kind: names.split()
        for names, kinds in {
            "v_proj": (
                "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text "
                "qwen2 qwen3"
            ),
            "value": "bert roberta",
            "value_proj": "deberta-v2",
            "v": "t5 mt5",
        }.items()
        for kind in kinds.split()
    },
    **dict.fromkeys(
        ("C3A", "FOURIERFT", "WAVEFT"),
        TARGETS | {kind: ["mlp.c_proj"] for kind in ("gpt2", "gpt_bigcode")},
    ),
    "IA3": {},  # its own file says which, for some are adapted otherwise than the rest
    "LN_TUNING": {
        kind: names.split()
        for names, kinds in {
            "input_layernorm post_attention_layernorm norm": (
                "llama mistral mixtral olmo qwen2_moe qwen3_moe smollm3 stablelm gemma"
            ),
            "post_attention_layernorm": "qwen2 qwen3",
            "input_layernorm final_layernorm": "phi",
            "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
            "input_layernorm post_attention_layernorm pre_feedforward_layernorm "
            "post_feedforward_layernorm norm": "gemma2 gemma3 gemma3_text",
            "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
            "layer_norm final_layer_norm": "t5 mt5 umt5",
            "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart opt",
            "ln_1 ln_2 ln_f": "gpt2 gpt_bigcode",
            "ln_1 ln_f": "gptj",
            "LayerNorm": "bert roberta electra deberta-v2",
        }.items()
        for kind in kinds.split()
    },
    "OSF": {
        kind: names.split()
        for names, kinds in {
            "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": (
                "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi"
            ),
            "c_attn c_proj": "gpt2 gpt_bigcode",
            "query_key_value dense_4h_to_h": "bloom gpt_neox falcon",
            "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
            "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        }.items()
        for kind in kinds.split()
    },
    "VBLORA": TARGETS
    | {kind: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"] for kind in ("bart", "opt")}
    | {
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    },
    "FROD": TARGETS | {"phi": ["q_proj", "v_proj"]},
    "VERA": TARGETS | {"phi": ["q_proj", "v_proj"]},
    "PVERA": TARGETS | {"phi": ["q_proj", "v_proj"], "dinov2": ["query", "value"]},
    "SHIRA": TARGETS | {"phi": ["q_proj", "v_proj"]},
    "BOTTLENECK houlsby": {
        k: [a] if "\\" in m else [a, m] for k, (a, m, _) in _BOTTLENECKS.items()
    },
    "BOTTLENECK pfeiffer": {k: m if "\\" in m else [m] for k, (_, m, _) in _BOTTLENECKS.items()},
    "BOTTLENECK parallel": {k: [b] for k, (_, _, b) in _BOTTLENECKS.items() if b},
}
"""A configuration's `usual` (most say their method) -> its own table of model_type ->
target_modules; one without a table takes TARGETS."""

HEADS: dict[str, list[str]] = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
"""task_type -> the heads that are new for the task: they train in full, saved with the adapter."""

UNREACHABLE = {"MultiheadAttention": ("out_proj",), "MambaMixer": ("out_proj", "conv1d")}
"""Class of a parent -> children whose weight it reads without calling them."""
