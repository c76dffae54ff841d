"""All adapters of one model: the sites they hold, which are active, merging and removing them.

Everything here is written once for every method; the methods' files know nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from inlay.bases import view
from inlay.core import patterns
from inlay.core.adapter import Adapter, Shared
from inlay.core.ahead import Ahead
from inlay.core.base import Base
from inlay.core.beside import Bias, Copy
from inlay.core.errors import UserError, nearest
from inlay.core.inlaid import Inlaid
from inlay.core.root import Root
from inlay.core.selection import BASE, Selection
from inlay.core.targeted import TargetedConfig
from inlay.methods import method_of
from inlay.model import packing, targets
from inlay.model.gradients import Gradients
from inlay.model.places import Places, no_longer_tied, resolved
from inlay.model.repeat import Repeated
from inlay.model.starts import begin


class Roster:
    """The adapters of `model` by name, and the hosts they sit in by module path.

    configs: name -> the configuration as resolved for this model (the user's own never changes).
    hosts: module path -> host; a module reachable by several paths has one host, under the first.
    trainable: the names whose parameters require gradients while they are selected.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the model as it is, with no adapter."""
        self.model = model
        self.selection = Selection()
        self.configs: dict[str, TargetedConfig] = {}
        self.hosts: dict[str, Inlaid] = {}
        self.trainable: set[str] = set()
        self._gradients = Gradients()
        self._ahead: dict[str, Ahead] = {}
        self._required_grad: dict[str, bool] | None = None
        self._repeated: Repeated | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order they came."""
        return tuple(self.configs)

    # -- adding and removing

    def add(
        self,
        name: str,
        config: TargetedConfig,
        *,
        strict: bool = True,
        device: torch.device | None = None,
        trainable: bool = True,
    ) -> dict[str, Adapter]:
        """Set a new adapter into the model and return it by site; on any error nothing has changed.

        A fresh one is initialized so that the model computes what it did; `device="meta"` leaves
        the parameters without memory, for a loader to fill. The first adapter becomes active.
        """
        self.check_new(name, config)
        chosen = method_of(config).of(config)
        if chosen is None:
            self._leave_trainable(name, config)
            return {}
        config = config.filled(self.model)
        self._repeat(config.repeats)
        try:
            return self._add(name, config, chosen, strict, device, trainable)
        except BaseException:
            if not self.configs:
                self._once_each(merged=False)
            raise

    def _add(
        self,
        name: str,
        config: TargetedConfig,
        chosen: type[Adapter],
        strict: bool,
        device: torch.device | None,
        trainable: bool,
    ) -> dict[str, Adapter]:
        with patterns.budget():
            sites = targets.resolve(self.model, config, strict=strict)
            settled = resolved(config, sites, self.model)
            places = Places(self.model)
            kinds: dict[str, type[Adapter]] = {
                **dict.fromkeys(sites.adapted, chosen),
                **dict.fromkeys(sites.saved, Copy),
                **dict.fromkeys(sites.biased, Bias),
            }
            extra = config.more(self.model, sites.adapted, sites.saved)
            kinds |= {path: also.kind or chosen for path, also in extra.items()}
            bases = {
                path: self._base(kind, path, places.modules[path]) for path, kind in kinds.items()
            }
            shared = None
            if sites.adapted:
                own = [bases[path] for path in sites.adapted]
                shared = chosen.share(settled, own, device=device)
            made = {
                path: self._make(
                    kind,
                    extra[path].config if path in extra else config.at(path),
                    bases[path],
                    device,
                    shared if kind is chosen else None,
                ).train(places.modules[path].training)
                for path, kind in kinds.items()
            }
            for path, also in extra.items():
                if also.follows:
                    made[path].follow(made[also.follows])
        if not self.configs:
            self._freeze_base()
            self.selection.active = (name,)
        for path, adapter in made.items():
            adapter.selection = self.selection
            host = self._host(places, path)
            host.adapters[name] = adapter
            adapter.beside(host.adapters)
        if shared is not None and type(shared).ahead is not Shared.ahead:
            self._ahead[name] = Ahead(self.model, name, shared, self.selection)
        self.configs[name] = settled
        if trainable:
            self.trainable.add(name)
        self._gradients.start(name, list(made.values()), on=trainable and self._is_active(name))
        return made

    def _base(self, kind: type[Adapter], path: str, module: nn.Module) -> Base:
        if isinstance(module, Inlaid) and module.selection is not self.selection:
            raise UserError(
                f"{path!r} holds adapters of another wrapper of this model: add to that one, "
                "or unload() it first"
            )
        base = module.base if isinstance(module, Inlaid) else view(module)
        base.path = path
        if base.kind not in kind.on:
            why = f": {base.reason}" if base.reason else ""
            raise UserError(
                f"{path!r} is a {type(targets.plain(module)).__name__}, to which {kind.__name__} "
                f"cannot be set{why} (it takes {', '.join(sorted(kind.on))}); " + _way_out(kind)
            )
        return base

    def _make(
        self,
        kind: type[Adapter],
        config: TargetedConfig,
        base: Base,
        device: torch.device | None,
        shared: Shared | None,
    ) -> Adapter:
        common: dict[str, Any] = {} if shared is None else {"shared": shared}
        adapter = kind(config, base, device=device, **common)
        if device is None:
            adapter.reset(base)
        begin(adapter, base, self.model, fill=device is None)
        return adapter

    def _host(self, places: Places, path: str) -> Inlaid:
        if not path:
            if path not in self.hosts:
                self.hosts[path] = Root(view(self.model), self.selection)
            return self.hosts[path]
        module = places.modules[path]
        if not isinstance(module, Inlaid):
            module = Inlaid(view(module), self.selection)
            module.base.path = path
            places.put(path, module)
        self.hosts[path] = module
        return module

    def _give_back(self, places: Places, path: str, module: nn.Module) -> None:
        host = self.hosts[path]
        if isinstance(host, Root):
            host.close()
        else:
            places.put(path, module)

    def remove(self, name: str) -> None:
        """Take an adapter out; hosts left empty give their place back to the plain module."""
        self.check(name)
        if name in self.selection.merged:
            raise UserError(f"{name!r} is merged: call unmerge_adapter() before deleting it")
        for other, config in self.configs.items():
            if name in config.parts:
                raise UserError(f"{name!r} is a part of {other!r}: delete that first")
        if name in self._ahead:
            self._ahead.pop(name).close()
        places = Places(self.model)
        for path, host in list(self.hosts.items()):
            if name in host.adapters:
                del host.adapters[name]
                if not len(host.adapters):
                    self._give_back(places, path, host.base_layer)
                    del self.hosts[path]
        del self.configs[name]
        self.trainable.discard(name)
        self._gradients.forget(name)
        if not self.configs:
            self._once_each(merged=False)
        self.selection.active = tuple(n for n in self.selection.active if n != name)
        if not self.selection.active and self.configs:
            self.select((self.names[0],))

    # -- choosing

    def check(self, *names: str) -> None:
        """Raise UserError where a name is not an adapter of this model, or is given twice."""
        for name in names:
            if name not in self.configs:
                raise UserError(
                    f"no adapter is called {name!r}; this model has "
                    f"{', '.join(self.names) or 'none'}.{nearest(str(name), self.names)}"
                )
        if len(set(names)) < len(names):
            raise UserError(f"{list(names)} names an adapter twice")

    def select(self, names: Sequence[str], *, train: bool = True) -> None:
        """Make `names` active, the first one closest to the base: one assignment, no walk.

        Of adapters in training, those selected are then the ones whose parameters require gradients
        (with `train` false, none). A backward pass still to come gives nothing to parameters that
        no longer require it; `selection.using` switches without touching that.
        """
        chosen = tuple(names)
        self.check(*chosen)
        self.selection.active = chosen
        made = (self.configs[name] for name in chosen)
        parts = (part for config in made if config.trains_parts for part in config.parts)
        self._gradients.only(self.trainable.intersection([*chosen, *parts]) if train else ())

    def _is_active(self, name: str) -> bool:
        return name in self.selection.active

    def row_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return `names` checked for routing: each an adapter of this model, or `__base__`."""
        self.check(*{n for n in names if n != BASE})
        return tuple(names)

    def adapters(self, name: str) -> Iterator[tuple[str, Inlaid, Adapter]]:
        """Yield (path, host, adapter) of every site the named adapter holds."""
        for path, host in self.hosts.items():
            if name in host.adapters:
                yield path, host, host.adapters[name]  # type: ignore[misc]

    # -- merging

    def merge(self, names: Sequence[str] | None = None, *, check: bool = False) -> None:
        """Merge the named (default: active) adapters into the base, keeping the originals.

        They count as the active ones until `unmerge`, after which those of before are active again.

        Either every site is merged or none: with a method that cannot, or (with `check`) a value
        that is not finite, what was merged before the error is put back. UserError names the site.
        """
        chosen = tuple(self.selection.active if names is None else names)
        self.check(*chosen)
        if self.selection.merged:
            raise UserError(
                f"{list(self.selection.merged)} is merged already: call unmerge_adapter() first"
            )
        if self.selection.rows is not None:
            raise UserError("cannot merge while the rows of a batch have adapters of their own")
        if not chosen:
            raise UserError("there is no active adapter to merge: name one")
        try:
            for path, host in self.hosts.items():
                try:
                    host.merge(chosen, check=check)
                except (TypeError, UserError) as error:
                    place = path or type(self.model).__name__
                    raise UserError(f"{place}: {error}; nothing was merged") from None
        except BaseException:
            self.unmerge()
            raise
        self.selection.merged = chosen

    def unmerge(self) -> None:
        """Put every original weight back, bit for bit."""
        for host in self.hosts.values():
            host.unmerge()
        self.selection.merged = ()

    def take_out(self, *, merged: bool) -> nn.Module:
        """Return the plain model without any host, its flags as they were before the first adapter.

        With `merged`, what was merged stays in its weights; a head that the merge has parted from
        the embedding it was tied to is then no longer called tied in the model's configuration.
        """
        names = self.selection.merged if merged else ()
        if not merged:
            self.unmerge()
        places = Places(self.model)
        # from the inside out: a copy that takes a block's place must not get the block's layers
        for path in sorted(self.hosts, key=lambda p: p.count("."), reverse=True):
            self._give_back(places, path, self.hosts[path].result(names))
        flags = self._required_grad or {}
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(flags.get(path, True))
        self._once_each(merged=bool(names))
        if names:
            no_longer_tied(self.model)
        packing.describe(self.model)
        for ahead in self._ahead.values():
            ahead.close()
        self.configs, self.hosts, self._ahead, self.trainable = {}, {}, {}, set()
        self._gradients, self._required_grad = Gradients(), None
        self.selection.merged = self.selection.active = ()
        return self.model

    # -- the base

    def _repeat(self, ranges: Sequence[Sequence[int]]) -> None:
        if ranges and self.configs:
            raise UserError(f"layer_replication needs a model with no adapter, not {self.names}")
        if ranges:
            self._repeated = Repeated(self.model, ranges)

    def _once_each(self, *, merged: bool) -> None:
        """Give the model its own layers back; with `merged`, each repeated one its own weights."""
        if self._repeated is not None:
            self._repeated.part() if merged else self._repeated.undo()
            self._repeated = None

    def _freeze_base(self) -> None:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if self._required_grad is None:
            self._required_grad = {path: p.requires_grad for path, p in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(False)

    def _leave_trainable(self, name: str, config: TargetedConfig) -> None:
        if self.configs:
            raise UserError(
                f"full fine-tuning {name!r} needs a model without adapters; it has "
                f"{', '.join(self.names)}"
            )
        packing.refuse_training(self.model, name)
        if config.target_modules is not None:
            sites = targets.resolve(self.model, config)
            self._freeze_base()
            found = dict(targets.modules(self.model))
            for path in (*sites.adapted, *sites.saved):
                found[path].requires_grad_(True)
        self.configs[name] = config
        self.selection.active = (name,)

    def check_new(self, name: str, config: TargetedConfig) -> None:
        """Raise UserError where no adapter of this name and kind can be added now."""
        if name in self.configs:
            raise UserError(
                f"an adapter called {name!r} exists: delete it first, or take another name"
            )
        named = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name)
        if not named or name == BASE or hasattr(nn.ModuleDict(), name):
            raise UserError(
                f"{name!r} cannot name an adapter: up to 64 letters, digits, '_' and '-', and no "
                "name Python's dictionaries use"
            )
        if self.selection.merged:
            raise UserError(
                f"cannot add {name!r} while {list(self.selection.merged)} is merged: "
                "call unmerge_adapter() first"
            )
        full = [n for n, c in self.configs.items() if method_of(c).adapter is None]
        if full:
            raise UserError(
                f"cannot add {name!r} to a model whose own weights train ({full[0]!r}): "
                "delete that first"
            )
        if getattr(config, "bias", "none") != "none":
            others = [n for n, c in self.configs.items() if getattr(c, "bias", "none") != "none"]
            if others:
                raise UserError(
                    f"adapter {name!r} trains biases, but {others[0]!r} does already: "
                    "only one adapter of a model can"
                )


def _way_out(kind: type[Adapter]) -> str:
    if kind is Bias:
        return "say bias='lora_only', or 'none'"
    return "leave it out of target_modules, or name it in exclude_modules"
