"""All adapters of one model: which sites they hold, which are active, and what merging and removing them does.

Everything here is written once for every method; the methods' files know nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from inlay.bases import view
from inlay.core.adapter import Adapter, Bias, Copy
from inlay.core.errors import UserError, nearest
from inlay.core.inlaid import Inlaid
from inlay.core.selection import BASE, Selection
from inlay.core.targeted import TargetedConfig
from inlay.methods import method_of
from inlay.model import targets

M = TypeVar("M", bound=nn.Module)


class Roster:
    """The adapters of `model` by name, and the hosts they sit in by module path.

    configs: name -> the configuration as resolved for this model (the user's own object is never changed).
    hosts: module path -> host; a module reachable by several paths has one host.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the model as it is, with no adapter."""
        self.model = model
        self.selection = Selection()
        self.configs: dict[str, TargetedConfig] = {}
        self.hosts: dict[str, Inlaid] = {}
        self.trainable: set[str] = set()
        self._required_grad = {p: p.requires_grad for p in model.parameters()}

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
        """Set a new adapter into the model and return it by site; on any error the model stays as it was.

        A fresh one is initialized so that the model computes what it did; `device="meta"` leaves the parameters
        without memory, for a loader to fill. The first adapter becomes active.
        """
        self._check_name(name)
        if self.selection.merged:
            raise UserError(
                f"cannot add {name!r} while {list(self.selection.merged)} is merged: call unmerge_adapter() first"
            )
        method = method_of(config)
        if method.adapter is None:
            self._leave_trainable(name, config)
            return {}
        if getattr(config, "bias", "none") != "none":
            others = [n for n, c in self.configs.items() if getattr(c, "bias", "none") != "none"]
            if others:
                raise UserError(
                    f"adapter {name!r} has bias={config.bias!r}, but {others[0]!r} trains biases already: "  # type: ignore[attr-defined]
                    "only one adapter of a model can"
                )
        sites = targets.resolve(self.model, config, strict=strict)
        found = dict(targets.modules(self.model))
        made: dict[str, Adapter] = {}
        kinds = {
            **dict.fromkeys(sites.adapted, method.adapter),
            **dict.fromkeys(sites.saved, Copy),
            **dict.fromkeys(sites.biased, Bias),
        }
        hosts: dict[int, Inlaid] = {}
        for path, kind in kinds.items():
            plain = targets.plain(found[path])
            if id(plain) in hosts:
                continue  # the same module by another path
            made[path] = self._make(kind, config, path, found[path], device)
            hosts[id(plain)] = self._host(found[path])
        self._install(found, hosts)
        for path, adapter in made.items():
            host = hosts[id(targets.plain(found[path]))]
            host.adapters[name] = adapter
            self.hosts[path] = host
        self._finish(name, config, sites, made, trainable=trainable)
        return made

    def _make(
        self,
        kind: type[Adapter],
        config: TargetedConfig,
        path: str,
        module: nn.Module,
        device: torch.device | None,
    ) -> Adapter:
        base = module.base if isinstance(module, Inlaid) else view(module)
        if base.kind not in kind.on:
            allowed = ", ".join(sorted(kind.on))
            raise UserError(
                f"{path!r} is a {type(targets.plain(module)).__name__}, to which {kind.__name__} cannot be set "
                f"(it takes {allowed}): leave it out of target_modules"
            )
        adapter = kind(config.at(path), base, device=device)
        if device is None:
            adapter.reset(base)
        return adapter.train(module.training)

    def _host(self, module: nn.Module) -> Inlaid:
        return module if isinstance(module, Inlaid) else Inlaid(view(module), self.selection)

    def _install(self, found: dict[str, nn.Module], hosts: dict[int, Inlaid]) -> None:
        for path, module in found.items():
            if not isinstance(module, Inlaid) and id(module) in hosts:
                self._put(path, hosts[id(module)])

    def _put(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self.model
        *above, name = path.split(".")
        for step in above:
            parent = targets.plain(getattr(parent, step))
        setattr(parent, name, module)

    def _finish(
        self,
        name: str,
        config: TargetedConfig,
        sites: targets.Sites,
        made: dict[str, Adapter],
        *,
        trainable: bool,
    ) -> None:
        if not self.configs:
            self._freeze_base()
            self.selection.active = (name,)
        resolved = config.replace(target_modules=_shortest(sites.adapted, config, self.model))
        heads = targets.HEADS.get(config.task_type or "", [])
        if heads or config.modules_to_save:
            saved = dict.fromkeys([*(config.modules_to_save or ()), *heads])
            resolved = resolved.replace(modules_to_save=list(saved))
        self.configs[name] = resolved
        if trainable:
            self.trainable.add(name)
        active = name in self.selection.active
        for adapter in made.values():
            adapter.requires_grad_(trainable and active)

    def remove(self, name: str) -> None:
        """Take an adapter out; hosts left empty give their place back to the plain module."""
        self.check(name)
        if name in self.selection.merged:
            raise UserError(f"{name!r} is merged: call unmerge_adapter() before deleting it")
        for path, host in list(self.hosts.items()):
            if name in host.adapters:
                del host.adapters[name]
                if not len(host.adapters):
                    self._replace(path, host, host.base_layer)
        del self.configs[name]
        self.trainable.discard(name)
        self.selection.active = tuple(n for n in self.selection.active if n != name)
        if not self.selection.active and self.configs:
            self.select((self.names[0],))

    def _replace(self, path: str, host: Inlaid, module: nn.Module) -> None:
        for other, found in list(targets.modules(self.model)):
            if found is host:
                self._put(other, module)
        self.hosts.pop(path)

    # -- choosing

    def check(self, *names: str) -> None:
        """Raise UserError where a name is not an adapter of this model."""
        for name in names:
            if name not in self.configs:
                raise UserError(
                    f"no adapter is called {name!r}; this model has {', '.join(self.names) or 'none'}."
                    f"{nearest(name, self.names)}"
                )

    def select(self, names: Sequence[str], *, train: bool = True) -> None:
        """Make `names` active, the first one closest to the base: one assignment.

        Only where adapters are in training does it also walk the hosts, so that those selected are the ones with
        gradients (with `train` false, none).
        """
        chosen = tuple(names)
        self.check(*chosen)
        self.selection.active = chosen
        if self.trainable:
            self._grade(self.trainable.intersection(chosen) if train else set())

    def _grade(self, training: set[str]) -> None:
        for host in self.hosts.values():
            for name, adapter in host.adapters.items():
                adapter.requires_grad_(name in training)

    def row_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return `names` checked for routing: each an adapter of this model, or `__base__`."""
        self.check(*(n for n in names if n != BASE))
        return tuple(names)

    def adapters(self, name: str) -> Iterator[tuple[str, Inlaid, Adapter]]:
        """Yield (path, host, adapter) of every site the named adapter holds."""
        for path, host in self.hosts.items():
            if name in host.adapters:
                yield path, host, host.adapters[name]  # type: ignore[misc]

    # -- merging

    def merge(self, names: Sequence[str] | None = None, *, check: bool = False) -> None:
        """Merge the named (default: active) adapters into the base, keeping the originals for `unmerge`.

        Either every site is merged or none: with a method that cannot, or (with `check`) a value that is not finite,
        what was merged before the error is put back. UserError names the site.
        """
        chosen = tuple(self.selection.active if names is None else names)
        self.check(*chosen)
        if self.selection.merged:
            raise UserError(
                f"{list(self.selection.merged)} is merged already: call unmerge_adapter() first"
            )
        if not chosen:
            raise UserError("there is no active adapter to merge: name one")
        try:
            for path, host in self.hosts.items():
                self._merge_site(path, host, chosen, check=check)
        except BaseException:
            self.unmerge()
            raise
        self.selection.active = chosen
        self.selection.merged = chosen

    def _merge_site(self, path: str, host: Inlaid, chosen: tuple[str, ...], *, check: bool) -> None:
        try:
            host.merge(chosen, check=check)
        except (TypeError, UserError) as error:
            raise UserError(f"{path}: {error}; nothing was merged") from None

    def unmerge(self) -> None:
        """Put every original weight back, bit for bit."""
        for host in self.hosts.values():
            host.unmerge()
        self.selection.merged = ()

    def take_out(self, *, merged: bool) -> nn.Module:
        """Return the plain model without any host; with `merged`, what was merged stays in its weights."""
        names = self.selection.merged if merged else ()
        if not merged:
            self.unmerge()
        for path, host in list(self.hosts.items()):
            self._replace(path, host, host.result(names))
        self.configs.clear()
        self.trainable.clear()
        self.selection.merged = ()
        self.selection.active = ()
        for parameter in self.model.parameters():
            parameter.requires_grad_(self._required_grad.get(parameter, True))
        return self.model

    # -- the base

    def _freeze_base(self) -> None:
        for parameter in self._required_grad:
            parameter.requires_grad_(False)

    def _leave_trainable(self, name: str, config: TargetedConfig) -> None:
        if self.configs:
            raise UserError(
                f"full fine-tuning {name!r} needs a model without adapters; it has {', '.join(self.names)}"
            )
        if config.target_modules is not None:
            sites = targets.resolve(self.model, config)
            self._freeze_base()
            found = dict(targets.modules(self.model))
            for path in (*sites.adapted, *sites.saved):
                found[path].requires_grad_(True)
        self.configs[name] = config
        self.selection.active = (name,)

    def _check_name(self, name: str) -> None:
        if name in self.configs:
            raise UserError(
                f"an adapter called {name!r} exists: delete it first, or take another name"
            )
        if (
            name == BASE
            or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name)
            or hasattr(nn.ModuleDict, name)
        ):
            raise UserError(
                f"{name!r} cannot name an adapter: up to 64 letters, digits, '_' and '-', and no name Python's "
                "dictionaries use"
            )


def _shortest(
    sites: tuple[str, ...], config: TargetedConfig, model: nn.Module
) -> list[str] | str | None:
    """Return target_modules for the file: what the user named, but shorthands spelled out for other readers."""
    given = config.target_modules
    if given is not None and not (isinstance(given, str) and given.lower() == targets.ALL_LINEAR):
        return given
    if not sites:
        return given
    ends = sorted({path.rsplit(".", 1)[-1] for path in sites})
    meant = dict.fromkeys(sites)
    reached = [
        p for p, _ in targets.modules(model) if any(p == e or p.endswith(f".{e}") for e in ends)
    ]
    return ends if all(p in meant for p in reached) else sorted(sites)
