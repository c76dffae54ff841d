"""The schema of a run: blocks of frozen dataclasses, and the table of keys derived from them.

A setting is a field: its name, type, default and docstring stand in its dataclass alone.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from inlay.config.docs import field_docs
from inlay.core.config import AdapterConfig, PeftType, default
from inlay.core.errors import UserError, nearest
from inlay.data.settings import DataConfig
from inlay.train.settings import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on the held-out rows before and after training, besides their loss."""

    answers: int = 100
    """Held-out rows that base and adapter each answer greedily, for exact match; 0 = none."""

    max_new_tokens: int = 64
    """Longest answer in tokens."""

    shown: int = 4
    """Answers of base and adapter to print side by side at the end."""

    def __post_init__(self) -> None:
        """Refuse what cannot be; raises UserError naming the field, the value and the limit."""
        for name, least in {"answers": 0, "max_new_tokens": 1, "shown": 0}.items():
            if getattr(self, name) < least:
                raise UserError(
                    f"evaluate.{name} is {getattr(self, name)!r}; it must be {least} or more"
                )


def _default_adapter() -> Any:
    return adapter_config("lora")(**recipe_defaults("lora"))


def _default_objective() -> Any:
    return objective_class("sft")()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run; every one may be left out but `data.path`."""

    base_model: str | None = None
    """The model that stays frozen: a hub id or a folder; left out = inlay-tiny, built in."""

    revision: str | None = None
    """Revision of the model on the hub: a branch, a tag or a commit."""

    trust_remote_code: bool = False
    """Run the Python code that the model's repository brings along; only for those you trust."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of the frozen weights; left out = as they are stored."""

    device: str | None = None
    """Where to train: cpu, cuda, cuda:1, mps; left out = the first GPU, else the CPU."""

    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Pack the frozen linears and experts as they are loaded (QLoRA): 4 bits, nf4 the closer, or
    int8."""

    autocast_adapter_dtype: bool = True
    """Keep the adapter in float32 over a base in 16 bits; false = in the base's dtype, half the
    memory of its weights, gradients and moments, for coarser steps."""

    adapter: AdapterConfig = dataclasses.field(default_factory=_default_adapter)
    """`method`, and that method's settings."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The rows."""

    objective: Any = dataclasses.field(default_factory=_default_objective)
    """`name`, and that objective's settings."""

    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """How to train."""

    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    """What to measure."""

    output_dir: str | None = None
    """The run folder; left out = runs/NAME, where NAME is that of the (first) data file."""

    def __post_init__(self) -> None:
        """Refuse what cannot be; raises UserError naming the field, the value and the limit."""
        if self.quantize != "none" and self.adapter.method is PeftType.FULL:
            raise UserError(
                f"quantize is {self.quantize}, and adapter full trains the base's own weights, "
                "which packed cannot move; leave quantize out, or take adapter: lora"
            )
        if not self.autocast_adapter_dtype and self.adapter.method is PeftType.FULL:
            raise UserError(
                "autocast_adapter_dtype is False, and adapter full has no adapter: the base trains "
                "in its own dtype, which `dtype` sets; leave autocast_adapter_dtype out"
            )
        task, wanted = self.adapter.task_type, self.objective.task
        if task != wanted and (task is not None or wanted != "CAUSAL_LM"):
            raise UserError(
                f"adapter.task_type is {task!r}; under objective {objective_name(self.objective)} "
                f"it must be {wanted}. For another task use get_peft_model in Python"
            )
        self.train.validate()
        for name in ("early_stopping_patience", "restore_best"):
            given = getattr(self.train, name)
            if given and not (self.data.eval_fraction or self.data.eval_path):
                raise UserError(
                    f"train.{name} is {given!r}, which needs held-out rows; "
                    "set data.eval_fraction or data.eval_path"
                )


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting, such as `train.learning_rate`."""

    name: str
    type: Any
    default: Any
    doc: str
    shown: bool = True
    """Whether help and config.yaml name it where it has its default: not what only files need."""

    @property
    def block(self) -> str:
        """The block it stands in, "" at the top."""
        return self.name.rpartition(".")[0]

    @property
    def last(self) -> str:
        """Its name within the block."""
        return self.name.rpartition(".")[2]

    @property
    def is_flag(self) -> bool:
        """Whether its name alone, as a command line word, sets it."""
        return self.type in (bool, bool | None)


BLOCKS = ("adapter", "data", "objective", "train", "evaluate")
SHORT = {"adapter": "adapter.method", "data": "data.path", "objective": "objective.name"}
"""Block -> the key that a bare value in the block's place sets: `adapter: lora`, `--data FILE`."""

_PEFT_ONLY = {field.name for field in dataclasses.fields(AdapterConfig)} - {"task_type"}


def adapter_config(method: str) -> Any:
    """Return the class of the method's settings; UserError where there is no such method."""
    from inlay.methods import method as find
    from inlay.methods import names

    if method not in names():
        raise UserError(
            f"adapter.method is {method!r}; there are {_methods()}.{nearest(method, names())}"
        )
    return find(method).config


def recipe_defaults(method: str, objective: str = "sft") -> dict[str, Any]:
    """Return the defaults of a recipe that are not those of the method's class, which are PEFT's.

    A recipe is for its objective's task; and an adapter on all linear layers comes close to full
    fine-tuning, one on q and v alone does not (Dettmers et al., arXiv:2305.14314, section 4).
    """
    from inlay.methods import method as find

    found = {"task_type": objective_class(objective).task}
    known = find(method)
    if known.adapter is None or not getattr(known.config, "everywhere", True):
        return found
    return found | {"target_modules": "all-linear"}


def objective_class(name: str) -> Any:
    """Return the objective's class; UserError where there is none of that name."""
    from inlay.objectives import OBJECTIVES

    if name not in OBJECTIVES:
        raise UserError(
            f"objective.name is {name!r}; there are {', '.join(OBJECTIVES)}."
            f"{nearest(name, OBJECTIVES)}"
        )
    return OBJECTIVES[name]


def objective_name(objective: Any) -> str:
    """Return the name of an objective in a recipe: that of its file."""
    return type(objective).__module__.rpartition(".")[2]


@cache
def keys(method: str = "lora", objective: str = "sft") -> dict[str, Key]:
    """Return every key of a run with this method and objective by its dotted name, in order."""
    found: dict[str, Key] = {}
    for name, key in _fields(RunConfig, "").items():
        if name not in BLOCKS:
            found[name] = key
        elif name == "adapter":
            found["adapter.method"] = Key(
                "adapter.method", str, "lora", "The method; one of " + _methods()
            )
            defaults = recipe_defaults(method, objective)
            found |= _fields(adapter_config(method), "adapter", defaults)
        elif name == "objective":
            found["objective.name"] = Key(
                "objective.name", str, "sft", "What is minimized; one of " + _objectives()
            )
            found |= _fields(objective_class(objective), "objective")
            # train's are the one switch for them: they change nothing but the speed
            for switch in ("packing", "fast"):
                found.pop(f"objective.{switch}", None)
        else:
            found |= _fields(type(key.default), name)
    return found


@cache
def all_keys() -> dict[str, Key]:
    """Return the keys of every method and objective; of those two have in common, one."""
    from inlay.methods import names
    from inlay.objectives import OBJECTIVES

    found: dict[str, Key] = {}
    for method in ("lora", *names()):
        for objective in ("sft", *OBJECTIVES):
            found = {**keys(method, objective), **found}
    return found


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return the value of every key of `config` by its dotted name."""
    method, objective = str(config.adapter.method).lower(), objective_name(config.objective)
    own = {"adapter.method": method, "objective.name": objective}
    return {
        name: own[name] if name in own else _value(config, name) for name in keys(method, objective)
    }


def build(method: str, objective: str, values: Mapping[str, Any]) -> RunConfig:
    """Return the RunConfig of `values` by dotted name, those left out at their defaults.

    Raises UserError for a value that its block refuses.
    """
    parts: dict[str, dict[str, Any]] = {name: {} for name in ("", *BLOCKS)}
    for name, key in keys(method, objective).items():
        if name not in ("adapter.method", "objective.name"):
            parts[key.block][key.last] = values.get(name, key.default)
    return RunConfig(
        **parts[""],
        adapter=adapter_config(method)(**parts["adapter"]),
        data=DataConfig(**parts["data"]),
        objective=objective_class(objective)(**parts["objective"]),
        train=TrainConfig(**parts["train"]),
        evaluate=EvaluateConfig(**parts["evaluate"]),
    )


def _value(config: RunConfig, name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _fields(cls: type, block: str, defaults: Mapping[str, Any] | None = None) -> dict[str, Key]:
    docs, types = field_docs(cls), typing.get_type_hints(cls)
    refused = getattr(cls, "not_yet", {})
    found = {}
    for field in dataclasses.fields(cls):
        name = f"{block}.{field.name}" if block else field.name
        value = (defaults or {}).get(field.name, default(field))
        doc = docs.get(field.name, "")
        hidden = field.name in refused or field.name in _PEFT_ONLY or doc.startswith("PEFT's")
        found[name] = Key(name, types[field.name], value, doc, not (block == "adapter" and hidden))
    found.pop("adapter.peft_type", None)  # the class says it
    return found


def _methods() -> str:
    from inlay.methods import names

    return ", ".join(names())


def _objectives() -> str:
    from inlay.objectives import OBJECTIVES

    return ", ".join(OBJECTIVES)
