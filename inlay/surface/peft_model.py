"""PEFT's model: a base with named adapters, by PEFT's names.

Each method is a line or two into `model/` or `checkpoint/`.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.checkpoint import folder as files
from inlay.checkpoint.adapter import load_adapter, save_adapter, with_parts
from inlay.checkpoint.export import tokenizer_files
from inlay.checkpoint.fingerprint import fingerprint
from inlay.core.base import PackedModule
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.core.selection import TASKS
from inlay.core.targeted import TargetedConfig
from inlay.model import packing
from inlay.model.combine import Way, combine
from inlay.model.convert import Approximation, convert
from inlay.model.roster import Roster
from inlay.surface.adapted import Adapted, fill_in_tied, leave_out_tied
from inlay.surface.config import targeted_config
from inlay.surface.signature import DECODER, OTHER, SPANS, TEXT, forward_of, takes_anything


class PeftModel(nn.Module):
    """A model with adapters, called like the model itself.

    `model(..., adapter_names=["a", "__base__", "b"])` and `generate(..., adapter_names=...)` give
    each row of the batch its own adapter.
    """

    def __init__(self, model: nn.Module, roster: Roster | None = None) -> None:
        """Take a model without adapters; `get_peft_model` and `from_pretrained` do."""
        super().__init__()
        if roster is None:
            if isinstance(model, PeftModel) or any(isinstance(m, Inlaid) for m in model.modules()):
                raise UserError(
                    "the model holds adapters already: use add_adapter(), or unload() them first"
                )
            roster = Roster(model)
        self.base_model = Adapted(model, roster)
        self.roster = roster
        self._base_fingerprint = fingerprint(model)
        self.register_state_dict_post_hook(leave_out_tied)
        self.register_load_state_dict_pre_hook(fill_in_tied)

    # -- running

    forward = forward_of(*TEXT, *DECODER, *OTHER, "labels", *SPANS)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set as any module does; a `forward` to stand in for this one is set on the base.

        Trainers put a forward of their own in a model's place, which calls `self.base_model` for
        the layers below its head: a model of transformers is what they mean. accelerate, which
        puts autocast around a forward and notes the original, means this one.
        """
        bound = isinstance(value, types.MethodType) and value.__self__ is self
        own = "_original_forward" in vars(self)
        if name == "forward" and bound and not own and value.__func__ is not type(self).forward:
            self.base_model.exchange(value.__func__)
        else:
            super().__setattr__(name, value)

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return what the model generates, with the active adapters, or each row with its own."""
        with self.routed(adapter_names, task_ids):
            return self.base_model.model.generate(*args, **kwargs)  # type: ignore[operator]

    def routed(
        self, names: Sequence[str] | None, tasks: Any = None
    ) -> contextlib.AbstractContextManager[None]:
        """Return the context in which each row of a batch has the adapter named for it.

        tasks: the number of each row's task [B], for methods that tell tasks apart; others do
        without.
        """
        if names is None and tasks is None:
            return contextlib.nullcontext()
        return self.roster.selection.using(
            rows=None if names is None else self.roster.row_names(names),
            said=None if tasks is None else {TASKS: torch.as_tensor(tasks)},
        )

    def __getattr__(self, name: str) -> Any:
        """Return the base's attribute: `config`, `device`, `get_input_embeddings` and the rest."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def get_base_model(self) -> nn.Module:
        """Return the base's own object, hosts included."""
        return self.base_model.model

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base takes what transformers' Trainer tells it for its loss."""
        base = self.base_model.model
        return bool(getattr(base, "accepts_loss_kwargs", takes_anything(base)))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # packed weights are buffers, which DDP would send to every process at every forward pass
        packed = [n for n, m in self.named_modules() if isinstance(m, PackedModule)]
        return [f"{n}.{b}" for n in packed for b, _ in self.get_submodule(n).named_buffers()]

    # -- choosing

    @property
    def peft_config(self) -> dict[str, TargetedConfig]:
        """The adapters' settings by name, as resolved for this model."""
        return dict(self.roster.configs)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that compute, the one closest to the base first."""
        return list(self.roster.selection.active)

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter; UserError where there is not exactly one."""
        names = self.active_adapters
        if len(names) != 1:
            raise UserError(
                f"{len(names)} adapters are active ({', '.join(names)}): use active_adapters"
            )
        return names[0]

    @property
    def active_peft_config(self) -> TargetedConfig:
        """The settings of the active adapter; UserError where there is not exactly one."""
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str | None:
        """The active adapter's method, by PEFT's name."""
        return self.active_peft_config.peft_type

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or a stack of them, the first closest to the base.

        Of the adapters in training, those active get gradients and the others none (with
        `inference_mode`, none do).
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        self.roster.select(names, train=not inference_mode)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute as the base alone for a `with` block; UserError while adapters are merged."""
        with self.roster.selection.using(active=()):
            yield

    # -- adding and removing

    def add_adapter(self, adapter_name: str, peft_config: AdapterConfig) -> None:
        """Add a new adapter, to be trained; it does not become active."""
        config = targeted_config(peft_config)
        with with_parts(self.roster, adapter_name, config):
            self.roster.add(adapter_name, config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; where it alone was active, the first that is left becomes so."""
        self.roster.remove(adapter_name)

    def unload(self) -> nn.Module:
        """Return the base as it was, bit for bit and with its own `requires_grad`."""
        return self.roster.take_out(merged=False)

    # -- combining

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add a LoRA combined of several; `inlay.model.combine` has the formulas.

        combination_type: cat, svd, linear, magnitude_prune, ties, dare_linear, dare_ties, and the
        last four with `_svd`. svd_rank: of what an SVD makes (default: the highest of the
        adapters). svd_clamp: the quantile to which its factors are clamped. svd_full_matrices: as
        in PEFT, but either way the same factors. density: the share of entries that pruning keeps.
        """
        del svd_full_matrices  # what the full form adds is cut off again
        way = Way(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        combine(self.roster, adapters, weights, adapter_name, way)

    def convert_to_lora(self, adapter_name: str, rank: int | float, new_name: str) -> Approximation:
        """Add a LoRA that stands for an adapter of any method; return how near it comes.

        rank: a whole number, or as a float the share of each update's squares to keep.
        """
        return convert(self.roster, adapter_name, new_name, rank)

    # -- merging

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the named (default: active) adapters into the base, until `unmerge_adapter`.

        With `safe_merge`, UserError where a merged value is not finite, with nothing merged.
        """
        self.roster.merge(adapter_names, check=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, bit for bit."""
        self.roster.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Return the plain model with the named (default: active) adapters merged for good.

        progressbar: taken as PEFT takes it; merging has no bar to show. With `safe_merge`,
        UserError where a merged value is not finite, with nothing merged.
        """
        del progressbar
        if not self.roster.selection.merged or adapter_names is not None:
            self.roster.merge(adapter_names, check=safe_merge)
        return self.roster.take_out(merged=True)

    # -- files

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str = "auto",
        is_main_process: bool = True,
        tokenizer: Any = None,
        chat_template: str | None = None,
        as_plain_lora: bool = False,
    ) -> None:
        """Write the adapters (default: all) in PEFT's files.

        "default" goes into the folder itself, another into a folder of its name within. Embeddings
        are written with an adapter of theirs and after a change of the vocabulary ("auto").
        is_main_process: false writes nothing, where another process of the training does.
        tokenizer, chat_template: written beside them, so that the adapter is used with what it was
        trained with. as_plain_lora: write LoRAs with a start of the base's (PiSSA, OLoRA) as plain
        ones of twice the rank, which any reader of PEFT's files can set into the base as it was.
        """
        if not safe_serialization:
            raise UserError(
                "safe_serialization=False asks for a pickle, which runs code when it is read: "
                "only safetensors are written"
            )
        if save_embedding_layers != "auto":
            raise UserError(
                f"save_embedding_layers={save_embedding_layers!r} is not supported: leave it at "
                "'auto', or name the embedding in modules_to_save"
            )
        if not is_main_process:
            return
        chosen = self.roster.names if selected_adapters is None else tuple(selected_adapters)
        self.roster.check(*chosen)
        for name in chosen:
            place = Path(save_directory) if name == "default" else Path(save_directory) / name
            extra = tokenizer_files(tokenizer, chat_template)
            ranks = self.base_model.ranks(name)
            with contextlib.nullcontext() if ranks is None else ranks.settled():
                save_adapter(
                    self.roster,
                    name,
                    place,
                    base=self._base_fingerprint,
                    extra=extra,
                    as_plain_lora=as_plain_lora,
                )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        *,
        revision: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        check_base: bool = True,
    ) -> PeftModel:
        """Return `model` with the adapter of a folder (or hub id) loaded; it is changed in place.

        is_trainable: whether the adapter gets gradients. check_base: refuse an adapter that was
        trained on another base of the same shape. The others are those of `load_adapter`. On any
        error the model stays as it was.
        """
        folder = files.fetch(model_id, revision)
        settings = config or files.read_config(folder)
        from inlay.surface.tasks import CLASSES  # which are classes of this one

        kind = CLASSES.get(settings.task_type or "", PeftModel) if cls is PeftModel else cls
        adapted = kind(model)
        adapted.load_adapter(
            folder,
            adapter_name,
            is_trainable,
            config=settings,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            check_base=check_base,
        )
        return adapted.eval() if not is_trainable else adapted

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        config: AdapterConfig | None = None,
        revision: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        check_base: bool = True,
    ) -> None:
        """Load one more adapter from a folder or hub id; the first one becomes active.

        autocast_adapter_dtype: as in `get_peft_model`. low_cpu_mem_usage: taken as PEFT takes it;
        an adapter never has memory before its tensors are read.
        """
        del low_cpu_mem_usage
        folder = files.fetch(model_id, revision)
        load_adapter(
            self.roster,
            adapter_name,
            folder,
            config=config,
            trainable=is_trainable,
            check_base=check_base,
        )
        if not autocast_adapter_dtype:
            follow_base(self.roster, adapter_name)

    # -- counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (trainable, all) parameters, adapters included; a shared one counts once.

        A packed weight counts as the values it stands for.
        """
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        every = sum(n for n, _ in counts) + packing.count(self)[1]
        return sum(n for n, trained in counts if trained), every

    def print_trainable_parameters(self) -> None:
        """Print the counts on one line."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / max(total, 1):.4f}"
        )


def follow_base(roster: Roster, name: str) -> None:
    """Give the adapter the dtype of the layers it is set into."""
    for _, host, adapter in roster.adapters(name):
        adapter.to(host.base.dtype)
