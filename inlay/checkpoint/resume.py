"""What training goes on with though no file of PEFT's holds it, in a file of its own beside those.

Of prefix tuning and P-tuning, a file has the virtual tokens alone; the network that they were
computed with stands in `inlay_training.safetensors`, and only training asks for it.
"""

from __future__ import annotations

from pathlib import Path

from inlay.checkpoint import folder as files
from inlay.core.errors import UserError
from inlay.model.roster import Roster


def unsaved(roster: Roster, name: str) -> dict[str, bytes]:
    """Return the file of what the adapter's own file does not hold; most have none."""
    from safetensors.torch import save

    held = {
        f"{path}.{key}".lstrip("."): tensor.detach().cpu().contiguous().clone()
        for path, _, adapter in roster.adapters(name)
        for key, tensor in adapter.unsaved().items()
    }
    return {files.UNSAVED: save(held, metadata={"format": "pt"})} if held else {}


def resume(roster: Roster, name: str, folder: Path) -> None:
    """Give the adapter what `unsaved` wrote, where `folder` has it; UserError if it is another's.

    Without such a file, as PEFT's folders are, training goes on with what the adapter's file holds.
    """
    path = folder / files.UNSAVED
    if not path.is_file():
        return
    tensors = files.read_tensors(path)
    for site, _, adapter in roster.adapters(name):
        start = f"{site}." if site else ""
        own = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        try:
            adapter.resume(own)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{path} does not belong to the adapter beside it ({str(error).splitlines()[0]}): "
                "remove it, and the virtual tokens themselves are trained"
            ) from None
