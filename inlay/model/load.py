"""Load a base and its tokenizer: the embedded one, a folder, or a hub id; safetensors only."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from inlay.core.errors import UserError, nearest
from inlay.kernels.allocator import return_freed
from inlay.model.packing import finish, new_ones_plain, reported, wanted
from inlay.model.quantizer import packed_at

TINY = "inlay-tiny"
"""The name of the embedded base."""
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""task_type -> the class of transformers that loads a base for it."""


def load_base(
    name_or_path: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    task_type: str | None = None,
    labels: Sequence[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a base, in evaluation mode; no tokenizer is None.

    name_or_path: a folder or an id on the hub; None is the embedded `inlay-tiny`. dtype: of the
    weights (default: the checkpoint's). device: default a GPU where there is one. task_type: one of
    PEFT's (default: causal or sequence-to-sequence, whichever the base is). labels: the classes
    that a head for classification tells apart (default: those that the checkpoint names). Raises
    UserError for a base that is not there, has no safetensors, lacks weights, or needs code of its
    own.
    """
    return load_whole(
        name_or_path,
        quantize,
        dtype,
        device,
        task_type=task_type,
        labels=labels,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )[:2]


def load_whole(
    name_or_path: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    task_type: str | None = None,
    labels: Sequence[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, tuple[str, ...]]:
    """Return what `load_base` does, and the names of the parameters that are new: a task's head."""
    name = str(name_or_path or TINY)
    source = embedded() if name == TINY else _checked(name)
    if revision is not None and os.path.isdir(source):
        raise UserError(f"revision {revision!r} goes with a hub id; {name} is on this machine")
    chosen = _dtype(dtype)
    where = _device(device)
    from transformers import AutoConfig

    given: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(name), quiet(name == TINY), _new_heads(labels is not None):
        named = {} if labels is None else {"id2label": dict(enumerate(labels))}
        config = AutoConfig.from_pretrained(source, **given, **named)
        if labels is not None:
            config.label2id = {label: i for i, label in enumerate(labels)}
        how, packing = {}, wanted(name, config, quantize, where)
        if packing is not None:
            how = packing.given_to(config)
            if where.type == "cpu":
                return_freed()  # who packs a base has no memory to leave lying
        with reported(name, packing):
            model, told = _auto(config, task_type).from_pretrained(
                source,
                config=config,
                dtype=chosen,
                use_safetensors=True,
                output_loading_info=True,
                **given,
                **how,
            )
        if packing is not None:
            finish(model)
    missing = told["missing_keys"]
    if task_type not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):  # the other tasks' heads are new
        if packing is not None and not packing.given:
            new_ones_plain(model, missing)
        missing = [key for key in missing if packed_at(model, key)]
    _check_whole(name, model, missing)
    if name == TINY:
        # not a path of this machine: adapters are saved with the name of their base
        model.name_or_path = model.config._name_or_path = TINY
    tokenizer = load_tokenizer(name, **given)
    if task_type == "SEQ_CLS" and tokenizer is not None and model.config.pad_token_id is None:
        # a decoder's head reads the last token before the padding
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(where).eval(), tokenizer, tuple(sorted(told["missing_keys"]))


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return the tokenizer of a base or of an adapter's folder, or None where there is none."""
    from transformers import AutoTokenizer

    source = embedded() if str(name_or_path) == TINY else str(name_or_path)
    if os.path.isdir(source) and not _has_tokenizer(Path(source)):
        return None
    with _explained(str(name_or_path)):
        return AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )


def most_tokens(base: Any) -> int | None:
    """Return how many tokens the base has positions for; None where they have no table to end."""
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "rope_parameters", None):  # rotary positions go on as far as one likes
        return None
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def embedded() -> str:
    """Return the folder of the embedded base."""
    return str(Path(__file__).parents[1] / "assets" / TINY)


def _checked(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is no model: it has no config.json{_adapter_hint(path)}")
        if not list(path.glob("*.safetensors")) and not list(path.glob("*.safetensors.index.json")):
            raise UserError(
                f"{path} holds no safetensors file. Weights in other formats are pickles, which "
                "run code when they "
                "are read; load the model with transformers and save it again"
            )
        return str(path)
    if path.exists():
        raise UserError(
            f"base_model {name!r} is a file; give the folder of a model, or an id on the hub"
        )
    if name.count("/") > 1 or name.startswith((".", "/", "~", "\\")):
        raise UserError(f"base_model {name!r}: there is no such folder")
    return name


def _adapter_hint(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "; it is an adapter, which is set into a base"
    return ""


def _has_tokenizer(folder: Path) -> bool:
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.txt",
        "vocab.json",
    )
    return any((folder / name).is_file() for name in names)


def _check_whole(name: str, model: Any, missing: Collection[str]) -> None:
    if missing:
        first = ", ".join(sorted(missing)[:3])
        raise UserError(
            f"base_model {name!r} holds no weights for {len(missing)} of the parameters of "
            f"{type(model).__name__} ({first}{', ...' if len(missing) > 3 else ''}), which would "
            "be random: the folder is not whole, or its model is for another task"
        )


def _auto(config: Any, task_type: str | None) -> Any:
    import transformers

    if task_type is None:
        task_type = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    if task_type not in AUTO:
        raise UserError(
            f"task_type {task_type!r} is not one of {', '.join(AUTO)}.{nearest(task_type, AUTO)}"
        )
    return getattr(transformers, AUTO[task_type])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    known: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if dtype not in known:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(known)}.{nearest(dtype, known)}")
    return known[dtype]


def _device(device: torch.device | str | None) -> torch.device:
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device {device!r} is no device; give cpu, cuda or cuda:N") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device {str(device)!r}: this machine has no CUDA device that torch can use"
        )
    return where


@contextmanager
def quiet(wanted: bool = False) -> Iterator[None]:
    """Show no progress bar of transformers where it is not wanted or there is no terminal."""
    from transformers.utils import logging

    wanted = wanted or not (sys.stderr and sys.stderr.isatty())
    shown = wanted and logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _new_heads(expected: bool) -> Iterator[None]:
    """Keep transformers from reporting a head that no checkpoint has, where that is as it must."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if expected:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what transformers raises for a base that it cannot load into a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(
            f"base_model {name!r}: its weights are no whole safetensors file ({error}); fetch or "
            "copy the model again"
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(
            f"base_model {name!r}: its weights have other shapes than its config.json says; fetch "
            "or copy the model again"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"base_model {name!r} needs code from its repository, which would run here; pass "
                "trust_remote_code=True to load_base if you have read it"
            ) from error
        text = str(error).strip() or type(error).__name__
        known = "" if os.path.isdir(name) else f" (the embedded base is {TINY!r})"
        raise UserError(
            f"base_model {name!r} cannot be loaded: {text.splitlines()[0]}{known}"
        ) from error
