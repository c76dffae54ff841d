"""What a run inferred, told before its first step."""

from __future__ import annotations

import math
from typing import Any

from inlay.config.dump import in_line
from inlay.config.resolve import DEFAULT, Resolved
from inlay.config.schema import flatten, keys, objective_name
from inlay.core.base import PackedModule
from inlay.data.dataset import Prepared
from inlay.train.distributed import world
from inlay.train.order import Order
from inlay.train.precision import device_of, reason
from inlay.train.settings import TrainConfig

ASKED = ("r", "alpha", "dropout", "rank", "tokens", "block_size")
"""What the names of settings end in that are told also where nobody set them."""


def facts(
    resolved: Resolved, model: Any, data: Prepared, precision: Any, objective: Any
) -> dict[str, list[str]]:
    """Return heading -> lines: settings and their origins, base, data, adapter, training.

    objective: as it came to be, packing or not.
    """
    return {
        "settings": settings(resolved),
        "base": [base(model)],
        "data": [*data.describe(), *cut(resolved, data)],
        "adapter": adapter(resolved, model),
        "training": [
            *training(resolved, data, precision, reason(resolved.config.train.precision, model)),
            batches(objective),
            *compiling(resolved.config.train),
        ],
    }


def settings(resolved: Resolved) -> list[str]:
    """Return one line an origin: what it set; of a recipe the file without its lines."""
    by_origin: dict[str, list[str]] = {}
    values = flatten(resolved.config)
    for name, origin in resolved.origins.items():
        if origin != DEFAULT:
            place = origin.rpartition(":")[0] or origin
            by_origin.setdefault(place, []).append(f"{name} {in_line(values[name])}")
    return [f"{place}: {', '.join(told)}" for place, told in by_origin.items()]


def base(model: Any) -> str:
    """Return name, class, size, dtype and device of the base."""
    plain = model.get_base_model()
    trained, total = model.get_nb_trainable_parameters()
    size = count(total - trained if model.roster.hosts else total)
    dtype = str(next(plain.parameters()).dtype).removeprefix("torch.")
    packed = sum(isinstance(module, PackedModule) for module in plain.modules())
    dtype += f" but for {several(packed, 'packed layer')}" if packed else ""
    name = getattr(plain, "name_or_path", "") or "a model"
    return f"{name}: {type(plain).__name__}, {size} parameters, {dtype}, on {device_of(model)}"


def cut(resolved: Resolved, data: Prepared) -> list[str]:
    """Return a line where the base has positions for fewer tokens than a row might have."""
    asked, limit = resolved.config.data.max_length, data.config.max_length
    return [] if limit == asked else [f"longest row: {limit} tokens, as the base has positions for"]


def adapter(resolved: Resolved, model: Any) -> list[str]:
    """Return what is trained, and how much of the whole that is."""
    config = resolved.config.adapter
    trainable, total = model.get_nb_trainable_parameters()
    share = f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%})"
    if not model.roster.hosts:
        return [f"{str(config.method).lower()}: {share}"]
    ends = sorted({path.rpartition(".")[2] for path in model.roster.hosts})
    layers = f"in {len(model.roster.hosts)} layers ({', '.join(ends)})"
    told = [
        f"{key.last} {getattr(config, key.last):g}"
        for key in keys(str(config.method).lower()).values()
        if key.block == "adapter"
        and key.shown
        and key.type in (int, float)
        # of what is as it is by default, only what everyone asks for
        and (getattr(config, key.last) != key.default or key.last.endswith(ASKED))
    ]
    return [f"{str(config.method).lower()} {layers}; {', '.join(told)}", share]


def training(resolved: Resolved, data: Prepared, precision: Any, why: str) -> list[str]:
    """Return how many steps of what size, the arithmetic and why it is, and the learning rate."""
    config, run = resolved.config.train, resolved.config
    rows = config.micro_batch_size * config.gradient_accumulation_steps * world()
    an_epoch = Order(len(data.train), rows, config.seed).steps_per_epoch
    steps = config.max_steps or max(1, math.ceil(config.num_epochs * an_epoch))
    warmup = config.warmup_steps
    rise = several(warmup, "step") if warmup is not None else f"{config.warmup_ratio:.0%}"
    size = several(min(rows, len(data.train)), "example")
    return [
        f"{objective_name(run.objective)}: {several(steps, 'step')} of {size} "
        f"({config.micro_batch_size} x {config.gradient_accumulation_steps}"
        f"{', more than there are' if rows > len(data.train) else ''}), "
        f"{several(steps / an_epoch, 'epoch')}",
        f"{str(precision).removeprefix('torch.')}{f', {why}' if why else ''}; "
        f"learning rate {config.learning_rate:g}, "
        f"{config.lr_scheduler} after a warmup of {rise}; seed {config.seed}{apart(config)}",
    ]


def batches(objective: Any) -> str:
    """Return how the rows of a micro-batch stand beside one another."""
    if getattr(objective, "packing", False):
        return "rows packed into one, without padding between them"
    return "rows padded to the longest of a micro-batch, those of like length together"


def compiling(config: TrainConfig) -> list[str]:
    """Return a line where layers are compiled, for the first steps then take long."""
    told = "layers by torch.compile: the first steps, and the first evaluation, take a while longer"
    return [told] if config.compile else []


def apart(config: TrainConfig) -> str:
    """Return in what a LoRA's factors are not trained alike."""
    if config.loraplus_lr_ratio is not None:
        return f"; B at {config.loraplus_lr_ratio:g} times that rate (LoRA+)"
    return {"adamw": "", "lorafa": "; A stays (LoRA-FA)"}.get(
        config.optimizer, f"; {config.optimizer}"
    )


def several(number: float, noun: str) -> str:
    """Return a number with its noun.

    >>> several(1, "step"), several(0.5, "epoch")
    ('1 step', '0.5 epochs')
    """
    told = str(number) if isinstance(number, int) else f"{number:.3g}"
    return f"{told} {noun}" if told == "1" else f"{told} {noun}s"


def count(number: int) -> str:
    """Return a number for reading.

    >>> count(2_640_000), count(7_000_000_000), count(12)
    ('2.64M', '7B', '12')
    """
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
