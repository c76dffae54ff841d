"""Write base and adapter as one plain transformers folder.

    inlay merge runs/support merged
    inlay merge my-adapter merged --base_model Qwen/Qwen3-0.6B --dtype bfloat16

The result needs neither inlay nor PEFT. The sum is made in float32 and rounded
once.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("source", metavar="RUN|ADAPTER", help="a run folder, or an adapter's")
    parser.add_argument(
        "folder", metavar="FOLDER", help="where to write; it must not hold anything"
    )
    parser.add_argument("--base_model", help="base in place of the one that the adapter names")
    parser.add_argument(
        "--any_base", action="store_true", help="do not check that it is the base of the training"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the written weights (default: the base's)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge, write, say where."""
    from inlay.checkpoint.export import export_model
    from inlay.core.errors import UserError
    from inlay.model.packing import unpack
    from inlay.run.opening import open_trained

    folder = Path(arguments.folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; remove it or give another folder")
    import torch

    model, tokenizer = open_trained(
        arguments.source, arguments.base_model, check_base=not arguments.any_base
    )
    plain = model.merge_and_unload(safe_merge=True) if hasattr(model, "roster") else model
    unpack(plain)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    export_model(plain, tokenizer, folder, dtype=dtype)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {type(plain).__name__}, {size / 2**20:,.1f} MiB, a plain transformers folder")
    return 0
