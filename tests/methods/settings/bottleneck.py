"""Bottleneck adapters: what the laws try of them; PEFT has no such method to compare with."""

from typing import Any

LAWS: list[dict[str, Any]] = [
    {"reduction_factor": 2},
    {"style": "houlsby", "reduction_factor": 100, "non_linearity": "gelu"},
    {"style": "parallel", "reduction_factor": 2, "non_linearity": "tanh", "scaling": 4.0},
]
PEFT: dict[str, Any] = {}
