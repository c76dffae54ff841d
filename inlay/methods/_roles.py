"""What layers of one role share in FRoD: a matrix V found in all their weights, and S's places.

A role is read in a layer's path: every layer's query projection has the same one.   I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.core.adapter import Shared
from inlay.core.base import Base
from inlay.core.errors import UserError


class Roles(Shared):
    """V [I, I], and the places of S's entries [2, N], of each role that a layer can have."""

    def __init__(self, config: Any, bases: Sequence[Base], device: torch.device | None) -> None:
        """Find them in the weights, unless a file holds them."""
        super().__init__()
        self.config = config
        self.role_of = [_role(base.path) for base in bases]
        # as in PEFT: of two layers of one role and number, such as an encoder's and a decoder's,
        # only the later one's weight counts
        found: dict[str, dict[int, Base]] = {}
        for at, (role, base) in enumerate(zip(self.role_of, bases, strict=True)):
            found.setdefault(role, {})[_layer(base.path, at)] = base
            if base.shape[1] != bases[self.role_of.index(role)].shape[1]:
                raise UserError(
                    f"{base.path!r} has {base.shape[1]} inputs, another layer called {role!r} has "
                    "not as many, and the two would share a matrix: leave one out"
                )
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        unsaved = not (config.save_projection and device is not None and device.type == "meta")
        self.roles = sorted(found)
        for role in self.roles:
            layers = [base for _, base in sorted(found[role].items())]
            inputs, where, dtype = layers[0].shape[1], bases[0].device, bases[0].adapter_dtype
            v = torch.empty(inputs, inputs, device="meta", dtype=dtype)
            shape = (2, config.entries(inputs))
            places = torch.empty(shape, device="meta", dtype=torch.long)
            size = torch.empty(2, device="meta", dtype=torch.long)
            if unsaved and where.type != "meta":
                weights = [base.weight().detach() for base in layers]
                v = _common([w.float().cpu() for w in weights], config.regularization_alpha)
                # rounded as PEFT's is: U is found for V as it then is
                v = v.to(weights[-1].dtype).to(where, dtype)
                places = _places(inputs, shape[1], generator).to(where)
                size = torch.tensor([inputs, inputs], device=where)
            for name, tensor in {"V": v, "s_indices": places, "s_size": size}.items():
                self.register_buffer(f"{name}_{role}", tensor, persistent=config.save_projection)

    def complete(self) -> None:
        """Refuse places outside of S, which a file may name."""
        for role in self.roles:
            inputs = len(self.get_buffer(f"V_{role}"))
            places, size = (self.get_buffer(f"s_{name}_{role}") for name in ("indices", "size"))
            inside = places.numel() == 0 or 0 <= int(places.min()) <= int(places.max()) < inputs
            if not inside or size.tolist() != [inputs, inputs]:
                raise UserError(
                    f"frod_s_indices.{role} names places outside of [{inputs}, {inputs}]"
                )

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, where they are saved."""
        if not self.config.save_projection:
            return {}
        buffers = dict(self.named_buffers())
        return {
            f"frod_{name}.{role}": (own, tuple(buffers[own].shape))
            for role in self.roles
            for name in ("V", "s_indices", "s_size")
            for own in (f"{name}_{role}",)
        }


def _role(path: str) -> str:
    """Return the role that PEFT reads in a path: "model.layers.3.mlp.up_proj" -> "mlp_up_proj"."""
    *above, last = path.split(".")
    if not above or above[-1].isdigit():
        return last
    if [*above[-2:], last] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{above[-1]}_{last}"


def _layer(path: str, otherwise: int) -> int:
    """Return the number of the block that a path leads through, as PEFT reads it."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    numbers = [part for part in (*after, *parts) if part.isdigit()]
    return int(numbers[0]) if numbers else otherwise


def _common(weights: list[Tensor], alpha: float) -> Tensor:
    """Return V [I, I] of weights [O, I]: they are all products U L V^T with it."""
    stacked = torch.cat(weights)
    if len(stacked) < stacked.shape[1]:
        vh: Tensor = torch.linalg.svd(stacked).Vh
        return vh.T
    q, r = torch.linalg.qr(stacked)
    one = torch.eye(len(r))
    parts = torch.split(q, [len(weight) for weight in weights])
    inverses = [torch.linalg.inv(part.T @ part + alpha * one) for part in parts]
    vectors = torch.linalg.eigh(torch.stack(inverses).mean(0)).eigenvectors
    found: Tensor = r.T @ vectors
    return found


def _places(inputs: int, count: int, generator: torch.Generator) -> Tensor:
    """Return row and column [2, N] of `count` entries of a matrix [I, I] off its diagonal."""
    drawn = torch.randperm(inputs * (inputs - 1), generator=generator)[:count]
    rows, columns = drawn // max(inputs - 1, 1), drawn % max(inputs - 1, 1)
    return torch.stack([rows, columns + (columns >= rows)])
