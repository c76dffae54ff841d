"""What every method's configuration shares: PEFT's common fields, and what it can answer."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from inlay.core import limits
from inlay.core.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import nn


class PeftType(enum.StrEnum):
    """The methods inlay knows, by the names PEFT writes into `adapter_config.json`."""

    LORA = "LORA"
    MISS = "MISS"
    HIRA = "HIRA"
    ROAD = "ROAD"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    SHIRA = "SHIRA"
    ADALORA = "ADALORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    GLORA = "GLORA"
    DEFT = "DEFT"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    BEFT = "BEFT"
    BITFIT = "BITFIT"
    VERA = "VERA"
    OSF = "OSF"
    SUPERTUNING = "SUPERTUNING"
    RANDLORA = "RANDLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    PVERA = "PVERA"
    HRA = "HRA"
    OFT = "OFT"
    BOFT = "BOFT"
    FOURIERFT = "FOURIERFT"
    WAVEFT = "WAVEFT"
    C3A = "C3A"
    LOHA = "LOHA"
    LOKR = "LOKR"
    FULL = "FULL"
    PROMPT_TUNING = "PROMPT_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    P_TUNING = "P_TUNING"
    CPT = "CPT"
    CARTRIDGE = "CARTRIDGE"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    POLY = "POLY"
    UNILORA = "UNILORA"
    TINYLORA = "TINYLORA"
    XLORA = "XLORA"
    VBLORA = "VBLORA"
    ADAMSS = "ADAMSS"
    LILY = "LILY"
    FROD = "FROD"
    BOTTLENECK = "BOTTLENECK"


class TaskType(enum.StrEnum):
    """What the adapted model is for; decides AutoPeftModel's class and which heads train."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class Files(Protocol):
    """How configurations are kept; whoever knows files and the hub hands it up to them."""

    def read(self, place: str | Path, revision: str | None) -> AdapterConfig:
        """Return the configuration in a folder, or in the hub's repository of that id."""

    def write(self, config: AdapterConfig, folder: str | Path) -> None:
        """Write `adapter_config.json` into `folder`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields common to all methods, with PEFT's names and defaults.

    A configuration is frozen: nothing inlay does to a model changes the object the user holds.
    """

    method: ClassVar[PeftType]
    not_yet: ClassVar[dict[str, str]] = {}
    """Fields of PEFT's files of which only the default is supported: name -> reason."""
    unwritten: ClassVar[tuple[str, ...]] = ()
    """Fields that PEFT's configuration of this method lacks: in a file only where they are set."""
    files: ClassVar[Files | None] = None
    """Set by `inlay.surface.config`."""

    task_type: str | None = None
    """What the model is for: one of `TaskType`, or None."""
    peft_type: str | None = None
    """The method's name in PEFT's files; filled in by the class."""
    auto_mapping: dict[str, Any] | None = None
    """Class and library of the base; written by PEFT where `task_type` is None."""
    peft_version: str | None = None
    """Version of the PEFT that wrote the file, kept as it was read."""
    base_model_name_or_path: str | None = None
    """Hub id or folder of the base the adapter was trained on."""
    revision: str | None = None
    """Revision of the base on the hub."""
    inference_mode: bool = False
    """Whether the adapter's parameters are frozen."""

    def __post_init__(self) -> None:
        """Refuse what cannot be (see `limits`); UserError names the field, value and limit."""
        object.__setattr__(self, "peft_type", str(self.method))
        if self.task_type is not None:
            task = str(plain(self.task_type))  # an enum of another library's counts by its value
            if task not in TaskType.__members__:
                raise UserError(
                    f"task_type {task!r} is not one of {', '.join(TaskType)}."
                    f"{nearest(task.upper(), TaskType)}"
                )
            object.__setattr__(self, "task_type", task)
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            # PEFT writes an empty list where nothing is set
            if field.name in self.not_yet and given and given != default(field):
                raise UserError(
                    f"{field.name}={getattr(self, field.name)!r} is not supported: "
                    f"{self.not_yet[field.name]}"
                )
        limits.check(self)

    @property
    def parts(self) -> Mapping[str, str]:
        """The other adapters of the model that this one is made of: name -> folder or hub id."""
        return {}

    @property
    def trains_parts(self) -> bool:
        """Whether these train with it."""
        return False

    def at(self, site: str) -> Self:
        """Return this configuration as it applies to the module path `site` (patterns resolved)."""
        del site
        return self

    def filled(self, model: nn.Module) -> Self:
        """Return this configuration with what it leaves to `model` filled in, as files state it."""
        del model
        return self

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`; the original stays as it is."""
        return dataclasses.replace(self, **changes)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` into the folder, as PEFT writes it; make it where need be.

        Raises UserError where the place is a file, or the disk is full.
        """
        self._kept().write(self, save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None
    ) -> Self:
        """Return the settings in an adapter's folder, or in the hub's repository of that id.

        Raises UserError where they cannot be read, or are another method's.
        """
        found = cls._kept().read(pretrained_model_name_or_path, revision)
        if not isinstance(found, cls):
            raise UserError(
                f"{pretrained_model_name_or_path} holds the settings of {found.method}, which are "
                f"no {cls.__name__}; read them by PeftConfig.from_pretrained"
            )
        return found

    @classmethod
    def _kept(cls) -> Files:
        if cls.files is None:
            raise UserError(
                f"{cls.__name__} was imported past inlay's public names, so it has no files: use "
                f"`from inlay import {cls.__name__}`, or import inlay.surface.config"
            )
        return cls.files

    def to_dict(self) -> dict[str, Any]:
        """Return the fields PEFT writes, in plain JSON types."""
        given = {f: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {
            field.name: value
            for field, value in given.items()
            if field.name not in self.unwritten or value != default(field)
        }


def default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass field, calling its factory where it has one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def plain(value: Any) -> Any:
    """Return `value` in JSON's types: enums as text, blocks as mappings, sets as sorted lists."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return value
