"""Say what a folder is: a run, an adapter, a checkpoint, a model.

    inlay info runs/support
    inlay info my-adapter --json
    inlay info

Without a folder it tells what is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from inlay.cli._machine import WAIT, processor, settle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="a run, an adapter, a model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what is known, one line a fact."""
    found = about(Path(arguments.folder).expanduser()) if arguments.folder else machine()
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False, default=str))
        return 0
    found = {name: value for name, value in found.items() if value is not None}
    width = max(map(len, found)) + 2
    for name, value in found.items():
        for i, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"{name if i == 0 else '':{width}}{line}")
    return 0


def about(folder: Path) -> dict[str, Any]:
    """Return what `folder` is and says of itself; UserError where it is nothing of ours."""
    from inlay.core.errors import UserError
    from inlay.run.opening import kind_of

    readers = {"run": _run, "adapter": _adapter, "checkpoint": _checkpoint, "model": _model}
    kind = kind_of(folder)
    if kind == "unknown":
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} is no run, adapter, checkpoint or model; it holds {inside}")
    return {"what": kind, "folder": str(folder), **readers[kind](folder)}


def machine() -> dict[str, Any]:
    """Return versions, device, processor, threads, compiled kernels and memory."""
    import importlib.metadata

    settle()  # so that it tells what a run would find
    import torch

    from inlay import __version__
    from inlay.train.precision import units

    packages = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "huggingface_hub")
    versions = {name: importlib.metadata.version(name) for name in packages}
    cuda = torch.cuda.is_available()
    device = f"cuda: {torch.cuda.get_device_name()}" if cuda else "cpu"
    name, features = processor()
    found = units(torch.device("cuda" if cuda else "cpu"))
    return {
        "inlay": __version__,
        "python": platform.python_version(),
        **versions,
        "device": device,
        "processor": ": ".join([name, " ".join(features)] if features else [name]),
        "train.precision": f"auto is {'bfloat16' if found else 'float32'}, "
        + (f"for which there is {found}" if found else "but for a base in bfloat16"),
        "cores": f"{os.cpu_count()} ({torch.get_num_threads()} threads)",
        "idle threads": f"OMP_WAIT_POLICY {os.environ.get(WAIT, 'not set')}",
        "kernels": _kernels(),
        "memory": _memory(),
        "base": "inlay-tiny, built in",
    }


def _kernels() -> list[str]:
    """Return which kernels are in use here, in C and on a GPU; compiles what has not been yet."""
    from inlay.kernels.native import HERE, library

    names = sorted(path.stem for path in HERE.glob("*.c"))
    compiled = [name for name in names if library(name) is not None]
    plain = [name for name in names if name not in compiled]
    told = [f"compiled: {', '.join(compiled)}"] if compiled else []
    if plain:
        told.append(f"plain torch, no compiler or not for this processor: {', '.join(plain)}")
    return told + _kernels_on_the_gpu()


def _kernels_on_the_gpu() -> list[str]:
    """Return which of Triton's kernels a GPU uses in its usual dtype; tries those not tried yet."""
    import torch

    from inlay.kernels import elementwise, gpu, linear_cross_entropy

    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )
    found = {
        name: asked(device, dtype) is not None
        for name, asked in (
            ("nf4", gpu.triton_for),
            ("elementwise", elementwise.triton_for),
            ("cross_entropy", linear_cross_entropy.triton_for),
        )
    }
    told = {by: ", ".join(name for name in found if found[name] is by) for by in (True, False)}
    words = {True: "Triton", False: "plain torch"}
    return [f"{words[by]} on {device}: {names}" for by, names in told.items() if names]


def _run(folder: Path) -> dict[str, Any]:
    from inlay.run.folder import Run
    from inlay.run.standing import is_held

    run = Run.open(folder)
    config, outcome, found = run.config, run.outcome, run.evaluation or {}
    steps = (
        f"{outcome.step} of {outcome.total_steps} steps, {outcome.stopped}" if outcome else "none"
    )
    if is_held(folder):
        state = "training now"
    elif run.is_finished:
        state = "finished"
    else:
        state = f"not finished; inlay train {folder / 'config.yaml'} goes on"
    scores = {
        side: ", ".join(
            f"{name} {found[side][name]:.4g}"
            for name in ("loss", "perplexity", "exact_match")
            if found[side].get(name) is not None
        )
        for side in ("base", "adapter")
        if found.get(side)
    }
    return {
        "state": state,
        "base model": config.base_model or "inlay-tiny",
        "method": str(config.adapter.method).lower(),
        "data": list(config.data.paths),
        "training": steps,
        "seconds": round(outcome.seconds, 1) if outcome else None,
        **{
            f"scores of the {side if side == 'base' else run.trained.name}": told
            for side, told in scores.items()
        },
        "trained": str(run.trained) if run.trained.is_dir() else "nothing yet",
    }


def _adapter(folder: Path) -> dict[str, Any]:
    from inlay.checkpoint.adapter import describe
    from inlay.config.schema import keys

    found = describe(folder)
    # the settings that a recipe shows, where they are set; not what only PEFT's files have
    shown = {
        key.last: found["config"][key.last]
        for key in keys(found["method"]).values()
        if key.block == "adapter"
        and key.shown
        and found["config"].get(key.last) not in (None, False, {}, [])
    }
    return {
        "method": found["method"],
        "base model": found["base_model"],
        "parameters": f"{found['parameters']:,} in {found['tensors']} tensors",
        "settings": [f"{name}: {value}" for name, value in shown.items()],
        "fingerprint of the base": "yes" if found["base"] else "no",
        "written by": f"inlay {found['inlay_version']}"
        if found["inlay_version"]
        else "another tool",
        "peft": found["peft_version"],
    }


def _checkpoint(folder: Path) -> dict[str, Any]:
    from inlay.checkpoint.train import Checkpoint, find_fault

    fault = find_fault(folder)
    if fault:
        return {"state": f"damaged: {fault}"}
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    progress = Checkpoint(folder, manifest["step"]).state()["progress"]
    return {
        "state": "whole",
        "step": manifest["step"],
        "training loss": _short(progress["train_loss"]),
        "held-out loss": _short(progress["eval_loss"]),
    }


def _model(folder: Path) -> dict[str, Any]:
    from inlay.checkpoint.folder import read_json, read_shapes

    config = read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    sizes = [_product(shape) for file in files for shape in read_shapes(file).values()]
    return {
        "class": ", ".join(config.get("architectures") or ["unknown"]),
        "model type": config.get("model_type"),
        "parameters": f"{sum(sizes):,} in {len(sizes)} tensors" if files else "no safetensors",
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "tokenizer": "yes" if (folder / "tokenizer_config.json").is_file() else "no",
        "vocabulary": config.get("vocab_size"),
    }


def _short(loss: float | None) -> float | None:
    return None if loss is None else float(f"{loss:.4g}")


def _product(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return "unknown"
    return f"{total / 2**30:.1f} GiB"
