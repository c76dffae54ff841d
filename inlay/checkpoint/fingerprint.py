"""Which base an adapter belongs to: architecture, hash of the configuration, sampled weights.

An adapter fits every base of the same shape, but means something on one only. The samples are
compared with a tolerance, so that the same base in another dtype is the same base, and a quantized
one is known by what it leaves unquantized.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.config import plain
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.model.targets import modules

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
    rounded = {n: torch.tensor(s["values"]).bfloat16().tolist() for n, s in samples.items()}
    return {
        "architecture": _architecture(model),
        "config": _config_hash(model),
        "weights": {"sha256": _sha256(rounded), "samples": samples},
    }


def check_same_base(
    model: nn.Module, saved: Any, where: Any, *, replaced: Sequence[str] = ()
) -> None:
    """Raise UserError where the fingerprint `saved`, from an adapter folder, is of another base.

    replaced: names of modules that the adapter brings a copy of; what the base has there is no
    matter (a new head is random each time).
    """
    try:
        architecture, config = saved["architecture"], saved["config"]
        samples = {
            str(name): {"shape": list(told["shape"]), "values": [float(v) for v in told["values"]]}
            for name, told in saved["weights"]["samples"].items()
            if not any(f".{part}." in f".{name}" for part in replaced)
        }
    except (TypeError, KeyError, AttributeError, ValueError):
        raise UserError(
            f"{where}: the fingerprint of the base cannot be read; "
            "restore the file, or delete it to load the adapter unchecked"
        ) from None
    differs = []
    if architecture != _architecture(model):
        differs.append(f"it was trained on a {architecture}, this is a {_architecture(model)}")
    elif config is not None and config != _config_hash(model):
        differs.append("the configurations differ in more than their vocabulary")
    mine = sample(model, samples)
    # a weight of another shape is a resized vocabulary, or the adapter's own tensors do not fit
    same = [n for n, s in mine.items() if s["shape"] == samples[n]["shape"]]
    apart = [n for n in same if not _close(mine[n]["values"], samples[n]["values"])]
    if apart:
        differs.append(f"{len(apart)} of {len(same)} sampled weights differ, {apart[0]} first")
    if differs:
        raise UserError(
            f"{where} belongs to another base: {'; '.join(differs)}. Load the base it was trained "
            "on, or pass check_base=False (--any_base on the command line) if this is meant"
        )


def sample(model: nn.Module, names: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return {"shape", "values": 16 of them} of 16 matrices of the base, or of those `names` says.

    Weights that are not plain numbers here (packed, or without memory) are left out.
    """
    found = {
        f"{path}.{name}": p.detach()
        for path, module in modules(model)
        for name, p in own_parameters(module).items()
        if p is not None and p.is_floating_point() and not p.is_meta
    }
    if names is None:
        names = sorted(n for n, p in found.items() if p.ndim > 1)
        if len(names) > TENSORS:
            names = [names[round(i * (len(names) - 1) / (TENSORS - 1))] for i in range(TENSORS)]
    return {n: _sample(found[n]) for n in names if n in found}


def _sample(weight: Tensor) -> dict[str, Any]:
    flat = weight.reshape(-1)
    count = min(VALUES, len(flat))
    index = torch.tensor([i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)])
    values = flat[index.to(flat.device)].double().tolist()
    return {"shape": list(weight.shape), "values": values}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters that the base has at this place, whatever is set in or merged there."""
    return module.originals() if isinstance(module, Inlaid) else dict(module._parameters)


def _close(ours: list[float], theirs: list[float]) -> bool:
    scale = max((abs(x) for x in theirs), default=0.0)
    return len(ours) == len(theirs) and all(
        math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-4 * scale)
        for a, b in zip(ours, theirs, strict=True)
    )


def _architecture(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return str(kind or type(model).__name__)


def _config_hash(model: nn.Module) -> str | None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return None
    told = config.to_diff_dict()
    return _sha256({k: plain(v) for k, v in told.items() if k not in _NOT_THE_MODEL})


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
