"""Write a base with its linear layers and experts in 4 or 8 bits.

    inlay quantize Qwen/Qwen3-0.6B qwen-nf4
    inlay train --base_model qwen-nf4 --data chats.jsonl

The base is read tensor by tensor, so it need not fit into memory in 16 bits.
The folder is one of transformers with bitsandbytes, and loads there too
(a mixture's does not: its experts are packed here alone).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("base_model", metavar="BASE", help="a model's folder, or its id on the hub")
    parser.add_argument(
        "folder", metavar="FOLDER", help="where to write; it must not hold anything"
    )
    parser.add_argument("--kind", default="nf4", help="nf4, fp4 or int8 (default: nf4)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the embeddings, norms and head (default: the base's)",
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda (default: a GPU if any)")
    parser.add_argument("--revision", help="of the base on the hub: a branch, a tag or a commit")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Pack, write, say where and how much it takes."""
    from inlay.core.errors import UserError
    from inlay.kernels.codec import check_kind

    folder = Path(arguments.folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; remove it or give another folder")
    check_kind(arguments.kind)
    from inlay.checkpoint.export import export_model
    from inlay.model.load import load_base
    from inlay.model.packing import count

    model, tokenizer = load_base(
        arguments.base_model,
        arguments.kind,
        arguments.dtype,
        arguments.device,
        revision=arguments.revision,
    )
    layers, values = count(model)
    _check_space(model, folder)
    export_model(model, tokenizer, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rest = sum(p.numel() for p in model.parameters())
    told = {"folder": str(folder), "model": type(model).__name__, "kind": arguments.kind}
    told |= {"layers": layers, "packed": values, "plain": rest, "bytes": size}
    _show(told, as_json=arguments.json)
    return 0


def _check_space(model: Any, folder: Path) -> None:
    """Raise UserError where the disk of `folder` has less room than the model will take."""
    import shutil

    from inlay.core.errors import UserError

    place = folder.absolute()
    while not place.exists():
        place = place.parent
    # a tied weight is written once
    held = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    needed, free = sum(held.values()), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{folder}: the packed model takes {needed / 2**20:,.0f} MiB, and its disk has "
            f"{free / 2**20:,.0f} free; nothing was written. Free some, or choose another folder"
        )


def _show(told: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"event": "quantized", **told}, ensure_ascii=False))
        return
    print(
        f"{told['folder']}: {told['model']}, {told['layers']} layers of {told['packed']:,} values "
        f"in {told['kind']}, {told['plain']:,} as they were; {told['bytes'] / 2**20:,.1f} MiB"
    )
