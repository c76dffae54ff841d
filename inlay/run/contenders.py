"""What a comparison trains: methods by name, with their own settings and learning rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inlay.config.aliases import rename
from inlay.config.given import Given
from inlay.config.resolve import Resolved, resolve
from inlay.config.schema import BLOCKS, adapter_config, flatten, keys, objective_name
from inlay.core.errors import UserError, nearest
from inlay.methods import method as find
from inlay.methods import names

ORIGIN = "inlay compare"
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
    "olora": ("lora", {"init_lora_weights": "olora"}),
}
"""Names that papers gave to settings of another method."""

RATES: Mapping[str, float] = {
    "full": 0.1,
    "bottleneck": 2.0,
    "bitfit": 5.0,
    "beft": 5.0,
    "ln_tuning": 5.0,
    "trainable_tokens": 5.0,
    "vera": 10.0,
    "pvera": 10.0,
    "ia3": 15.0,
    "p_tuning": 15.0,
    "prefix_tuning": 50.0,
    "prompt_tuning": 50.0,
}
"""Method -> its usual learning rate as a multiple of LoRA's; 1 where it is not named. The fewer the
numbers that carry a change, the further each has to go."""

SHARED = {
    f"adapter.{name}"
    for name in (
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "task_type"),
    )
}
"""Settings of the recipe's adapter that hold for the other methods too, where they have them."""
SAME = ("train.max_steps", "train.num_epochs", "train.seed")
"""Settings that are the comparison's own, and no contender may have otherwise."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One line of a comparison."""

    name: str
    method: str
    settings: tuple[Given, ...] = ()
    """What is set for it alone."""

    @property
    def rate(self) -> float:
        """Its usual learning rate, as a multiple of LoRA's."""
        return RATES.get(self.method, 1.0)

    @property
    def own_rate(self) -> bool:
        """Whether its learning rate is set for it alone."""
        return any(given.key == "train.learning_rate" for given in self.settings)


def contenders(methods: Sequence[str], sets: Sequence[str]) -> list[Contender]:
    """Return the contenders of words `METHOD` or `NAME=METHOD`, with settings `NAME.KEY=VALUE`.

    KEY is a field of the method, or `train.KEY`. Raises UserError for a name twice, a method that
    is none, a setting of nobody, and one that would make the comparison unlike.
    """
    found: dict[str, Contender] = {}
    for word in methods:
        name, _, what = word.partition("=")
        method, fields = VARIANTS.get(what or name, (what or name, {}))
        if method not in names():
            known = [*names(), *VARIANTS]
            raise UserError(
                f"--methods names {method!r}; there are {', '.join(known)}.{nearest(method, known)}"
            )
        if name in found or not name.replace("-", "").replace("_", "").isalnum():
            what = "is given twice" if name in found else "is no name"
            raise UserError(
                f"--methods: {name!r} {what}; give names of letters, digits, - and _, such as "
                f"--methods small={method},large={method}"
            )
        own = tuple(Given(f"adapter.{key}", value, ORIGIN) for key, value in fields.items())
        found[name] = Contender(name, method, own)
    if len(found) < 2:
        raise UserError("--methods names fewer than 2; give several, such as lora,dora,ia3,full")
    for word in sets:
        given = _set(word, found)
        name = word.partition(".")[0]
        found[name] = dataclasses.replace(found[name], settings=(*found[name].settings, given))
    return list(found.values())


def settings_of(
    contender: Contender, recipe: Iterable[Given], words: Iterable[Given], own: str, name: str
) -> Resolved:
    """Return the settings of a run of `contender`; those of the recipe's adapter go to its method.

    own: the method that the recipe's `adapter:` block is of. name: the objective's.
    """
    layers = [_for(contender, layer, own, name) for layer in (recipe, words)]
    method = [Given("adapter.method", contender.method, ORIGIN)]
    return resolve(*layers, method, contender.settings)


def changed(resolved: Resolved, values: Mapping[str, Any]) -> Resolved:
    """Return `resolved` with other values by dotted key."""
    layers = [
        Given(key, value, resolved.origins[key])
        for key, value in flatten(resolved.config).items()
        if key in values or resolved.origins[key] != "default"
    ]
    again = resolve(layers, [Given(key, value, ORIGIN) for key, value in values.items()])
    return dataclasses.replace(again, notices=resolved.notices)


def _set(word: str, known: Mapping[str, Contender]) -> Given:
    left, equals, value = word.partition("=")
    name, dot, key = left.partition(".")
    if not (equals and dot and key):
        raise UserError(f"--set {word}: it has the form NAME.KEY=VALUE, such as lora.r=8")
    if name not in known:
        raise UserError(
            f"--set {word}: --methods names no {name!r}, only {', '.join(known)}."
            f"{nearest(name, known)}"
        )
    block = key.partition(".")[0]
    full = key if block in BLOCKS else f"adapter.{key}"
    there = keys(known[name].method)
    if full not in there or full == "adapter.method" or not full.startswith(("adapter.", "train.")):
        own = [k.removeprefix("adapter.") for k in there if k.startswith("adapter.")]
        raise UserError(
            f"--set {word}: {key!r} is no setting of {known[name].method} that may be its own."
            f"{nearest(key, own)} All that is not of the adapter or of train is the recipe's"
        )
    if full in SAME:
        raise UserError(f"--set {word}: {full} is the same for all; set it with --{full}")
    return Given(full, value, f"--set {name}.{key}", is_word=True)


def _for(contender: Contender, layer: Iterable[Given], own: str, objective: str) -> list[Given]:
    config = adapter_config(contender.method)
    everywhere = find(contender.method).adapter is not None and getattr(config, "everywhere", True)
    kept = []
    for given in layer:
        if given.key in BLOCKS and given.value is None:
            continue
        key = rename(given)[0].key
        if not key.startswith("adapter."):
            kept.append(given)
        elif key == "adapter.method" or key not in keys(contender.method, objective):
            continue
        elif contender.method == own or (
            key in SHARED and (everywhere or key == "adapter.modules_to_save")
        ):
            kept.append(given)
    return kept


def own_method(resolved: Resolved) -> tuple[str, str]:
    """Return the method and the objective of a recipe's settings."""
    config = resolved.config
    return str(config.adapter.method).lower(), objective_name(config.objective)
