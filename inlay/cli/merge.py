"""Write base and adapter as one plain transformers folder.

    inlay merge runs/support merged
    inlay merge my-adapter merged --base_model Qwen/Qwen3-0.6B --dtype bfloat16

The result needs neither inlay nor PEFT. The sum is made in float32 and rounded
once. Over a base in 4 bits, the merged model is compared with the adapter over
its base on rows of the run, before anything is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


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
    parser.add_argument(
        "--min_agreement",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="over a base in 4 bits: of the next tokens, how many must stay (default: 0.95)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge, write, say where."""
    from inlay.checkpoint.export import export_model
    from inlay.core.errors import UserError
    from inlay.model.packing import count, unpack
    from inlay.run.agreement import compare, says
    from inlay.run.opening import open_trained

    folder = Path(arguments.folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; remove it or give another folder")
    import torch

    model, tokenizer = open_trained(
        arguments.source, arguments.base_model, check_base=not arguments.any_base
    )
    examples = _rows(arguments.source, model, tokenizer) if count(model)[0] else []
    before = says(model, examples)
    plain = model.merge_and_unload(safe_merge=True) if hasattr(model, "roster") else model
    unpack(plain)
    if examples:
        agreement = compare(before, says(plain, examples))
        agreement.require(arguments.min_agreement)
        print(agreement.told())
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    export_model(plain, tokenizer, folder, dtype=dtype)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {type(plain).__name__}, {size / 2**20:,.1f} MiB, a plain transformers folder")
    return 0


def _rows(source: str, model: Any, tokenizer: Any) -> list[Any]:
    """Return rows of the run to compare on; where there are none, say so and return none."""
    from inlay.core.errors import UserError
    from inlay.run.agreement import examples_of
    from inlay.run.folder import Run
    from inlay.run.opening import is_hub_id, kind_of

    if is_hub_id(source) or kind_of(source) != "run":
        print(f"{source} is no run, so it has no rows on which to compare before and after")
        return []
    try:
        return examples_of(Run.open(source).config, model, tokenizer)
    except UserError as error:
        print(f"not compared before and after: {error}")
        return []
