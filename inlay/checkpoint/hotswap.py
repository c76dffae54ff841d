"""Another LoRA's tensors into the place of one: for a compiled model, which then compiles nothing.

What the compiler has seen stays (the parameters, their shapes, the scales); only what they hold
changes. So all LoRAs are brought to one rank and to scale 1 before compiling, and a new adapter's
rank is filled up with zeros and its scale multiplied into B.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.checkpoint import folder as files
from inlay.checkpoint.adapter import base_tensors, changed_embeddings, check_origin
from inlay.checkpoint.names import PREFIX, listed
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError
from inlay.core.numbers import check_whole
from inlay.methods import method_of
from inlay.methods.lora import Lora, LoraConfig
from inlay.model.roster import Roster


@torch.no_grad()
def prepare(roster: Roster, target_rank: int | None = None) -> None:
    """Bring every adapter to rank `target_rank` (default: the largest there is) and scale 1.

    What they compute stays. UserError, with nothing changed, where one is no plain LoRA or has a
    higher rank.
    """
    for name in roster.names:
        _check_plain(roster.configs[name], repr(name))
    sites = {name: list(roster.adapters(name)) for name in roster.names}
    ranks = [len(a.lora_A) for found in sites.values() for _, _, a in found]  # type: ignore[arg-type]
    rank = max(ranks, default=1) if target_rank is None else target_rank
    check_whole("target_rank", rank)
    if ranks and max(ranks) > rank:
        raise UserError(f"target_rank={rank} is below the rank {max(ranks)} of an adapter here")
    for name, found in sites.items():
        config = _check_plain(roster.configs[name], repr(name)).replace(
            r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}
        )
        for path, _, adapter in found:
            assert isinstance(adapter, Lora)
            a, b = _filled_up(adapter.lora_A, adapter.config.scaling * adapter.lora_B, rank)
            for part, value in (("lora_A", a), ("lora_B", b)):
                train = adapter.get_parameter(part).requires_grad
                setattr(adapter, part, nn.Parameter(value, requires_grad=train))
            adapter.config = config.at(path)
        roster.configs[name] = config


@torch.no_grad()
def hotswap(roster: Roster, name: str, folder: str | Path, *, check_base: bool = True) -> None:
    """Put the LoRA in `folder` into the place of adapter `name`, whose parameters stay themselves.

    It may sit on fewer layers than `name` does: on the others the update becomes zero. UserError,
    with nothing changed, where it sits on more, has a higher rank, is no plain LoRA, or does not
    load for another reason.
    """
    folder = Path(folder)
    roster.check(name)
    _check_plain(roster.configs[name], repr(name))
    settings = _check_plain(files.read_config(folder), str(folder))
    file = files.tensor_file(folder)
    check_origin(roster, folder, settings, base=check_base)
    tensors = dict(files.read_tensors(file))
    filled: list[tuple[Lora, Tensor, Tensor]] = []
    for path, host, adapter in roster.adapters(name):
        assert isinstance(adapter, Lora)
        room = len(adapter.lora_A)
        new = Lora(settings.at(path), host.base, device=torch.device("meta"))
        keys = {f"{PREFIX}{path}.{key}": part for key, (part, _) in new.keys(host.base).items()}
        given = {part: tensors.pop(key) for key, part in keys.items() if key in tensors}
        if not given:
            zeros = torch.zeros_like(adapter.lora_A), torch.zeros_like(adapter.lora_B)
            filled.append((adapter, *zeros))
            continue
        if new.config.r > room:
            raise UserError(
                f"{folder} has rank {new.config.r} at {path!r}, and {name!r} has room for {room}: "
                f"call prepare_model_for_compiled_hotswap(model, target_rank={new.config.r}) "
                "before compiling"
            )
        for key, part in keys.items():
            if part not in given or given[part].numel() != new.get_parameter(part).numel():
                raise UserError(f"{key} is missing from {file}, or misshaped")
        b, a = (given[part].to(adapter.lora_A) for part in ("lora_B", "lora_A"))
        b = b.reshape(new.lora_B.shape) * (new.config.scaling / adapter.config.scaling)
        filled.append((adapter, *_filled_up(a.reshape(new.lora_A.shape), b, room)))
    _check_rest(roster, name, tensors, folder)
    for adapter, a, b in filled:
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)


def _check_rest(roster: Roster, name: str, rest: dict[str, Tensor], folder: Path) -> None:
    """Raise UserError where a file holds more than A and B, and embeddings as they are here."""
    base = base_tensors(roster, rest.keys(), {key: tuple(t.shape) for key, t in rest.items()})
    changed_embeddings(base, rest, folder, alone=False)
    strange = sorted(rest.keys() - base.keys())
    if strange:
        raise UserError(
            f"{folder} has tensors where {name!r} has no adapter: {listed(strange)}. Only an "
            "adapter of the same layers, or fewer, can be swapped in; load_adapter takes others"
        )


def _filled_up(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, I] and B [O, rank], with zeros for what they lack."""
    more = rank - len(a)
    return nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))


def _check_plain(config: AdapterConfig, what: str) -> LoraConfig:
    """Return the settings of an adapter that is A and B at every site; UserError for any other."""
    if not isinstance(config, LoraConfig) or method_of(config).of(config) is not Lora:
        raise UserError(f"{what} is no plain LoRA, and only that can be swapped in place")
    extra = {
        "bias": config.bias != "none",
        "modules_to_save": bool(config.modules_to_save),
        f"init_lora_weights={config.init_lora_weights!r}": config.start
        not in (None, "orthogonal", "eva"),
    }
    found = [name for name, there in extra.items() if there]
    if found:
        raise UserError(
            f"{what} has {', '.join(found)}: only A and B can be swapped in place; use load_adapter"
            " and set_adapter"
        )
    return config
