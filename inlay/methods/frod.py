"""FRoD: W = U L V^T becomes U (L' + S) V^T, L' diagonal and S sparse   (AAAI 2026).

Full-rank efficient fine-tuning with rotational degrees, doi.org/10.1609/aaai.v40i31.39813.
V [I, I] is found once for all layers of one role, from their weights; then U [O, I], with columns
of norm 1, and L are a layer's own.  L' [I] and S's entries, at places drawn once from a seed,
train.  What runs is W + U (L' - L + S) V^T: the same, and at the start exactly W.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method, Shared
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Scale, Seed
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrodConfig(TargetedConfig):
    """FRoD's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.FROD
    unwritten = ("exclude_modules",)
    not_yet: ClassVar[dict[str, str]] = {
        "runtime_offload_base_weight": "the base's weight is part of what runs, so it stays"
    }

    projection_prng_key: Seed = 0
    """Seed that the places of S's entries are drawn from."""
    save_projection: bool = True
    """Whether a file holds V and the places; without, they are found again in the base."""
    frod_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "frod_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: L' starts at L and S at zero. False: both random, for tests."""
    sparse_rate: Scale = 0.01
    """Share of S's entries, those on the diagonal left out, that train."""
    regularization_alpha: Scale = 1e-3
    """What is added to a matrix before it is inverted in finding V."""
    progressbar: bool = True
    """PEFT's note that it shows its progress in finding V; kept for the files."""
    runtime_offload_base_weight: bool = False
    """Whether PEFT keeps the base's weight on the CPU; only False."""

    def __post_init__(self) -> None:
        """Refuse shares below 0 or above 1, and a regularization below 0."""
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise UserError(f"sparse_rate={self.sparse_rate!r} must be from 0 to 1")
        if not self.regularization_alpha >= 0:
            raise UserError(f"regularization_alpha={self.regularization_alpha!r} must not be < 0")

    def entries(self, inputs: int) -> int:
        """Return how many entries S [I, I] has."""
        most = inputs * (inputs - 1)
        return min(max(int(inputs * inputs * self.sparse_rate), self.sparse_rate > 0), most)


class Roles(Shared):
    """V [I, I], and the places of S's entries [2, N], of each role that a layer can have."""

    def __init__(
        self, config: FrodConfig, bases: Sequence[Base], device: torch.device | None
    ) -> None:
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


class Frod(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    drops = "frod_dropout"
    config: FrodConfig
    U: Tensor
    start: Tensor

    @classmethod
    def share(
        cls, config: FrodConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Roles:
        """Return V and the places, of every role."""
        return Roles(config, bases, device)

    def make(self, base: Base) -> None:
        """Make L' [I] and S's entries [N], and room for U [O, I] and L [I]."""
        inputs, dtype = base.shape[1], base.adapter_dtype
        self.frod_lambda_l = self.parameter(inputs)
        self.frod_lambda_s_values = self.parameter(self.config.entries(inputs))
        for name, shape in {"U": base.shape, "start": (inputs,)}.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_buffer(name, empty, persistent=False)

    def complete(self, base: Base) -> None:
        """Find U and L, which no file holds, for V as it is."""
        weight, v = base.weight().detach().double().cpu(), self._v.double().cpu()
        try:
            product = torch.linalg.solve(v, weight.T).T
        except torch.linalg.LinAlgError:
            product = weight @ torch.linalg.pinv(v, rtol=1e-6).T
        norms = product.norm(dim=0)
        self.U = torch.where(norms > 1e-12, product / norms, 0).to(base.device, self.dtype)
        self.start = norms.to(base.device, self.dtype)

    def reset(self, base: Base) -> None:
        """Start from an update of zero."""
        super().reset(base)
        random = 0.0 if self.config.init_weights else 0.1
        nn.init.normal_(self.frod_lambda_s_values, std=random)
        with torch.no_grad():
            self.frod_lambda_l.copy_(self.start + random * torch.randn_like(self.start))

    def _of(self, name: str) -> Tensor:
        (roles,) = self._held
        assert isinstance(roles, Roles)
        return roles.get_buffer(f"{name}_{roles.role_of[self.number]}")

    @property
    def _v(self) -> Tensor:
        return self._of("V")

    def _middle(self, dtype: torch.dtype) -> Tensor:
        """Return L' - L + S [I, I]; dense, for a product faster than a sparse one."""
        change = torch.diag((self.frod_lambda_l - self.start).to(dtype))
        rows, columns = self._of("s_indices").to(change.device)
        return change.index_put((rows, columns), self.frod_lambda_s_values.to(dtype), True)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return U (L' - L + S) [O, I] and V^T [I, I]."""
        u = self.U.to(dtype)
        return u @ self._middle(dtype), self._v.to(u.device, dtype).T

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share, from the input's side: the middle is the smaller."""
        h = base.down(self.dropped(x), self._v.to(self.U.device, self.dtype).T)
        return base.up(F.linear(h, self._middle(self.dtype)), self.U)


METHOD = Method(FrodConfig, Frod)
