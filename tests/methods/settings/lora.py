"""LoRA: what the laws and the comparison with PEFT try of it."""

from functools import partial

from tests.methods.bases import bert, gpt2, gpt_oss, llama, mixtral, t5, vit

tied = partial(llama, tie_word_embeddings=True)
TIED_LORA = {
    "r": 4,
    "target_modules": ["embed_tokens", "q_proj"],
    "ensure_weight_tying": True,
}
TOKENS_APART = {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 60]}}
LAWS = [
    {},
    {"bias": "lora_only", "r": 3},
    {"use_rslora": True, "lora_alpha": 3, "r": 2},
    {"use_dora": True, "r": 2},
    {"use_dora": True, "bias": "lora_only", "r": 2},
    {"lora_bias": True, "bias": "lora_only", "r": 2, "lora_alpha": 3},
    {"use_qalora": True, "qalora_group_size": 2, "r": 2},
    {"use_bdlora": {"target_modules_bd_a": [""], "nblocks": 2}, "r": 2, "lora_alpha": 2},
    {"kasa_config": {}, "r": 2, "lora_alpha": 2},
    {"use_bdlora": {"match_strict": False}, "r": 2, "lora_alpha": 2},
]
PEFT = {
    "plain": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "DoRA": (llama, {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA on Conv1D": (gpt2, {"r": 4, "use_dora": True, "fan_in_fan_out": True}),
    "DoRA on an encoder": (bert, {"r": 4, "use_dora": True, "use_rslora": True}),
    "DoRA on an encoder-decoder": (t5, {"r": 4, "use_dora": True}),
    "DoRA on a conv": (vit, {"r": 4, "target_modules": ["projection"], "use_dora": True}),
    "DoRA on an embedding": (
        llama,
        {"r": 4, "target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    ),
    "a bias of its own": (bert, {"r": 4, "lora_bias": True, "lora_alpha": 16, "bias": "all"}),
    "a bias of its own on Conv1D": (gpt2, {"lora_bias": True, "fan_in_fan_out": True}),
    "a bias of its own on a conv": (
        vit,
        {"r": 4, "target_modules": ["projection"], "lora_bias": True},
    ),
    "BD-LoRA": (
        llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "use_bdlora": {
                "target_modules_bd_a": ["q_proj"],
                "target_modules_bd_b": ["down_proj"],
                "nblocks": 2,
            },
        },
    ),
    "tokens": (llama, {"r": 4, "trainable_token_indices": [3, 5, 60]}),
    "tokens of an embedding and a tied head": (tied, {"trainable_token_indices": [3, 5, 60]}),
    "tokens of a head apart": (llama, TOKENS_APART),
    "tokens of a tied head apart": (tied, TOKENS_APART),
    "tokens of an encoder-decoder": (t5, {"trainable_token_indices": [3, 5, 60]}),
    "tokens of an encoder": (bert, {"trainable_token_indices": {"word_embeddings": [3, 4]}}),
    "one LoRA on tied layers": (tied, TIED_LORA),
    "one copy of tied layers": (
        tied,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "experts": (mixtral, {"r": 2, "target_parameters": ["gate_up_proj", "experts.down_proj"]}),
    "experts and layers": (
        mixtral,
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "gate.weight", "k_proj.weight"],
            "rank_pattern": {"experts.down_proj": 3},
        },
    ),
    "experts the other way round": (
        gpt_oss,
        {"r": 2, "lora_alpha": 3, "target_parameters": ["gate_up_proj", "down_proj"]},
    ),
    "KaSA": (llama, {"r": 4, "kasa_config": {"beta": 1e-4}}),
    "aLoRA": (llama, {"r": 4, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}),
}
# where embedding and head are one weight, PEFT adds what is meant for each of them to it
PEFT_DOES_NOT_MERGE = [TIED_LORA, TOKENS_APART]
# its tied head has parameters of its own in the embedding's memory, each with steps of its own
PEFT_COUNTS_TWICE = [TIED_LORA]
