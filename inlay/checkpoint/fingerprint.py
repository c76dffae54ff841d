"""Which base an adapter belongs to: architecture, hash of the configuration, sampled weights.

An adapter fits every base of the same shape, but means something on one only. The samples are
compared with a tolerance, so that the same base in another dtype is the same base, and a quantized
one is known by what it leaves unquantized.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from inlay.core.config import plain
from inlay.core.errors import UserError
from inlay.model.targets import modules
from inlay.model.targets import plain as plain_module

TENSORS, VALUES = 16, 16
"""Weights that are sampled, and the values of each."""
TOLERANCE = 2.0**-7
"""Relative difference that rounding to a half-precision type can make, and a little more."""

# what does not change which function the weights compute, or changes with the library's version
_NOT_THE_MODEL = {
    "transformers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "quantization_config",
    "vocab_size",
    "attn_implementation",
    "_attn_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "gradient_checkpointing",
}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return {"architecture", "config", "weights": {"sha256", "samples"}} of the base in a model.

    A few hundred values are read, whatever the model's size.
    """
    samples = sample(model)
    rounded = {name: torch.tensor(v).bfloat16().tolist() for name, v in samples.items()}
    return {
        "architecture": _architecture(model),
        "config": _config_hash(model),
        "weights": {"sha256": _sha256(rounded), "samples": samples},
    }


def check_same_base(model: nn.Module, saved: Any, ours: Mapping[str, Any], where: Any) -> None:
    """Raise UserError where `saved`, from an adapter folder, is of another base than `ours`.

    `model` gives the values of the weights that `saved` sampled.
    """
    try:
        architecture, config = saved["architecture"], saved["config"]
        samples = {str(n): [float(x) for x in v] for n, v in saved["weights"]["samples"].items()}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise UserError(
            f"{where}: the fingerprint of the base cannot be read; "
            "restore the file, or delete it to load the adapter unchecked"
        ) from None
    differs = []
    if architecture != ours["architecture"]:
        differs.append(f"it was trained on a {architecture}, this is a {ours['architecture']}")
    elif config is not None and config != ours["config"]:
        differs.append("the configurations differ in more than their vocabulary")
    mine = sample(model, samples)
    apart = [n for n, values in mine.items() if not _close(values, samples[n])]
    if apart:
        differs.append(f"{len(apart)} of {len(mine)} sampled weights differ, {apart[0]} first")
    if differs:
        raise UserError(
            f"{where} belongs to another base: {'; '.join(differs)}. Load the base it was trained "
            "on, or pass "
            "check_base=False (--any_base on the command line) if this is meant"
        )


def sample(model: nn.Module, like: Mapping[str, Any] | None = None) -> dict[str, list[float]]:
    """Return 16 values each of 16 matrices of `model`, or of the weights that `like` names.

    Weights that are not plain numbers here (packed, or without memory) are left out.
    """
    found = {
        f"{path}.{name}": p.detach()
        for path, module in modules(model)
        for name, p in plain_module(module)._parameters.items()
        if p is not None and p.is_floating_point() and not p.is_meta
    }
    found = {n: p for n, p in found.items() if (p.ndim > 1 if like is None else n in like)}
    names = sorted(found)
    if like is None and len(names) > TENSORS:
        names = [names[round(i * (len(names) - 1) / (TENSORS - 1))] for i in range(TENSORS)]
    samples = {}
    for name in names:
        flat = found[name].reshape(-1)
        count = min(VALUES, len(flat))
        if like is not None and len(like[name]) != count:
            continue
        index = torch.tensor([i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)])
        samples[name] = flat[index.to(flat.device)].double().tolist()
    return samples


def _close(ours: list[float], theirs: list[float]) -> bool:
    scale = max((abs(x) for x in theirs), default=0.0)
    return all(
        math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-4 * scale)
        for a, b in zip(ours, theirs, strict=True)
    )


def _architecture(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return str(kind or type(model).__name__)


def _config_hash(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return None
    told = config.to_diff_dict()
    return _sha256({k: plain(v) for k, v in told.items() if k not in _NOT_THE_MODEL})


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
