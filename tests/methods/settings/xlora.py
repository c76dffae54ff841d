"""X-LoRA: it mixes other adapters of a model, so that no layer alone, nor a file alone, has it."""

from typing import Any

APART = "tests/methods/test_xlora.py"
"""Where it is compared with PEFT and tried: the common tests add one adapter to a model."""
LAWS: list[dict[str, Any]] = [{"adapters": {"0": "a LoRA"}, "hidden_size": 6}]
PEFT: dict[str, Any] = {}
