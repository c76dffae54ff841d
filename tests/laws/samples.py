"""What law 1 is tried on: every method filled at random, and a sample of every kind of layer.

A new file in `inlay/methods` is tried with its default settings, or with those that its file in
`tests/methods/settings` says (LAWS); a new file in `inlay/bases` states the layers to try it on as
`SAMPLES`, beside its `LAYERS`: name -> () -> (module, input).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import inlay.bases
from inlay.bases import view
from inlay.bases._experts import pack_parameters
from inlay.core.adapter import Adapter, Reweight, Wrap
from inlay.core.base import Base
from inlay.core.beside import Bias, Copy
from inlay.core.errors import UserError
from inlay.methods import method, names
from inlay.methods._parameters import ParameterLora
from inlay.methods.lora import LoraConfig
from tests.methods.bases import settings_of_methods


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


def scaled_embedding() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=6**0.5)


def gemma_norm() -> nn.Module:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    return Gemma2RMSNorm(6)


class Mixture(nn.Module):
    """Matrices in no layer: a router [E, I] and a stack [E, O, I], which it mixes by that."""

    def __init__(self, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.router = nn.Parameter(torch.empty(3, 6))
        self.experts = nn.Parameter(torch.empty(3, 6, 5) if is_transposed else torch.empty(3, 5, 6))
        self.bias = nn.Parameter(torch.empty(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts = self.experts.mT if self.is_transposed else self.experts
        weights = (x @ self.router.T).softmax(-1)
        return torch.einsum("...e,eoi,...i->...o", weights, experts, x) + self.bias


def packed_mixture(*, kind: str = "nf4", is_transposed: bool = False) -> nn.Module:
    module = Mixture(is_transposed=is_transposed)
    nn.init.normal_(module.experts)
    return pack_parameters(module, ["experts"], kind)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ids() -> torch.Tensor:
    return torch.randint(1, 11, (3, 4))


class Scale(Reweight):
    """diag(s) W, s * b: a method as short as one can be, which only says what it means."""

    def make(self, base: Base) -> None:
        self.scale = self.parameter(base.shape[0])

    def reweight(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale = self.scale.to(weight.dtype)
        rows = scale if weight.ndim == 1 else scale[:, None]
        return rows * weight, None if bias is None else scale * bias


Sample = Callable[[], tuple[nn.Module, torch.Tensor]]
SAMPLES: dict[str, Sample] = {
    "linear": lambda: (nn.Linear(6, 5), floats(3, 4, 6)),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), floats(3, 6)),
    "linear of even sizes": lambda: (nn.Linear(8, 4), floats(3, 4, 8)),
    "Conv1D": lambda: (conv1d(), floats(3, 4, 6)),
    "conv1d": lambda: (nn.Conv1d(2, 5, 3, padding=1, padding_mode="circular"), floats(3, 2, 9)),
    "conv2d": lambda: (
        nn.Conv2d(2, 5, (3, 2), stride=2, padding=1, bias=False),
        floats(3, 2, 7, 8),
    ),
    "conv2d dilated": lambda: (
        nn.Conv2d(2, 5, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"),
        floats(3, 2, 9, 8),
    ),
    "conv2d without batch": lambda: (nn.Conv2d(2, 5, 3, padding="same"), floats(2, 7, 8)),
    "conv3d": lambda: (nn.Conv3d(2, 5, 2, dilation=(1, 2, 1)), floats(3, 2, 4, 5, 4)),
    "embedding": lambda: (nn.Embedding(11, 6), ids()),
    "embedding with padding": lambda: (nn.Embedding(11, 6, padding_idx=0), ids()),
    "scaled embedding": lambda: (scaled_embedding(), ids()),
    "LayerNorm": lambda: (nn.LayerNorm(6), floats(3, 4, 6)),
    "LayerNorm without bias": lambda: (nn.LayerNorm(6, bias=False), floats(3, 4, 6)),
    "RMSNorm": lambda: (nn.RMSNorm(6), floats(3, 4, 6)),
    "Gemma's RMSNorm": lambda: (gemma_norm(), floats(3, 4, 6)),
    "mixture": lambda: (Mixture(), floats(3, 4, 6)),
    "mixture the other way round": lambda: (Mixture(is_transposed=True), floats(3, 4, 6)),
    "mixture in nf4": lambda: (packed_mixture(), floats(3, 4, 6)),
    "mixture in int8 the other way round": lambda: (
        packed_mixture(kind="int8", is_transposed=True),
        floats(3, 4, 6),
    ),
    "GroupNorm": lambda: (nn.GroupNorm(2, 6), floats(3, 6, 4, 5)),
    **{
        name: sample
        for file in pkgutil.iter_modules(inlay.bases.__path__)
        for name, sample in getattr(
            importlib.import_module(f"inlay.bases.{file.name}"), "SAMPLES", {}
        ).items()
    },
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed conv": lambda: nn.ConvTranspose1d(4, 6, 3),
    "renormalizing embedding": lambda: nn.Embedding(11, 6, max_norm=1.0),
    "BatchNorm": lambda: nn.BatchNorm1d(6),
    "a block": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh()),
    "scaled 8-bit floats": lambda: nn.Linear(6, 5).to(torch.float8_e4m3fn),
}

# what is tried of a method: its defaults, or what its file in tests/methods/settings says
SETTINGS: dict[str, list[dict[str, Any]]] = {
    name: module.LAWS for name, module in settings_of_methods().items()
}
APART = {name for name, module in settings_of_methods().items() if hasattr(module, "APART")}
"""The methods that a single layer cannot try; their settings say where they are tried."""
HOSTED = [name for name in names() if name not in APART and method(name).adapter is not None]
WRAPS = [name for name in HOSTED if issubclass(method(name).adapter or Adapter, Wrap)]
"""The methods that declare that no weight can say them: the law holds for all others."""
MADE: dict[str, tuple[type[Adapter], Any]] = {
    **{
        f"{name} {setting or ''}".strip(): (method(name).of(config), config)
        for name in HOSTED
        if name not in WRAPS
        for setting in SETTINGS.get(name, [{}])
        for config in [method(name).config(**setting)]
    },
    "lora on parameters": (
        ParameterLora,
        LoraConfig(r=2, target_parameters=["experts", "router"], alpha_pattern={"router": 3}),
    ),
    "lora on one parameter": (ParameterLora, LoraConfig(r=2, target_parameters=["experts"])),
    "no more than a meaning": (Scale, LoraConfig()),
    "bias": (Bias, LoraConfig(bias="all")),
    "copy": (Copy, LoraConfig()),
}


def sampled(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module, x = SAMPLES[name]()
    module.double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_()  # a norm starts as ones, which hide a forgotten weight
    return module, x


def holds(made: str, module: nn.Module) -> bool:
    kind, config = MADE[made]
    base = view(module)
    if base.kind not in kind.on or (kind is Bias and base.bias() is None):
        return False
    try:
        kind(config, base)
    except (
        UserError,
        UserWarning,
    ):  # some methods cut a layer into blocks, and say which sizes they take
        return False
    return True


def filled(made: str, module: nn.Module, seed: int = 1) -> Adapter:
    kind, config = MADE[made]
    adapter = kind(config, view(module)).eval().requires_grad_(True)
    torch.manual_seed(seed)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return list(
        torch.autograd.grad(
            (out * torch.randn_like(out)).sum(),
            leaves,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def leaves_of(x: torch.Tensor, *adapters: Adapter) -> list[torch.Tensor]:
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    return inputs + [p for adapter in adapters for p in adapter.parameters()]


def assert_same(
    ran: torch.Tensor, meant: torch.Tensor, leaves: list[torch.Tensor], what: str
) -> None:
    torch.testing.assert_close(ran, meant, rtol=1e-10, atol=1e-10, msg=f"{what}: values")
    torch.testing.assert_close(
        gradients(ran, leaves), gradients(meant, leaves), rtol=1e-9, atol=1e-9
    )


def fold(module: nn.Module, *adapters: Adapter) -> tuple[torch.Tensor, torch.Tensor | None]:
    said = view(module).weight(), view(module).bias()
    for adapter in adapters:
        assert isinstance(adapter, Reweight)
        said = adapter.reweight(*said)
    return said
