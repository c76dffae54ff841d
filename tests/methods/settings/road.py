"""RoAd: what the laws and the comparison with PEFT try of it. PEFT sets it into nn.Linear alone."""

from tests.methods.bases import bert, llama, t5

LAWS = [
    {"group_size": 4},
    {"group_size": 2, "variant": "road_2"},
    {"group_size": 2, "variant": "road_4"},
]
PEFT = {
    "decoder": (llama, {"group_size": 16, "target_modules": ["q_proj", "down_proj"]}),
    "encoder, road_2": (
        bert,
        {"group_size": 8, "variant": "road_2", "target_modules": ["query", "dense"]},
    ),
    "encoder-decoder, road_4": (t5, {"group_size": 4, "variant": "road_4"}),
    "decoder, road_4": (llama, {"group_size": 16, "variant": "road_4"}),
}
