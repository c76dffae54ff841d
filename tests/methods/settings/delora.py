"""DeLoRA: what the laws and the comparison with PEFT try. PEFT sets it into nn.Linear alone."""

from tests.methods.bases import bert, llama, t5

LAWS = [{"r": 3, "delora_lambda": 2}, {"r": 2, "bias": "delora_only"}]
PEFT = {
    "decoder": (
        llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3},
            "lambda_pattern": {"0.self_attn.q_proj": 4},
        },
    ),
    "encoder": (bert, {"r": 4, "bias": "delora_only"}),
    "encoder-decoder": (t5, {"r": 4, "delora_lambda": 3, "target_modules": ["q", "wo"]}),
}
