"""A prefix or cartridge from a text, a cache or other cartridges, by PEFT's names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.checkpoint import folder as files
from inlay.core.errors import UserError
from inlay.methods._past import Past, cached_table
from inlay.methods.cartridge import CartridgeConfig
from inlay.surface.functions import roster_of


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Fill a prefix or cartridge with the base's cache of a text's first tokens; return the table.

    num_virtual_tokens: taken as PEFT takes it; the adapter's own is the only one that fits.
    use_chat_template: read the text as a system message, where the tokenizer has a template.
    max_length: tokens of the text that count. UserError where it has fewer than virtual tokens.
    """
    adapter = _held(model, adapter_name, num_virtual_tokens)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        chat = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    # what a decoder's cache has of a token depends on none after it
    ids = ids[:max_length][: adapter.count]
    if len(ids) < adapter.count:
        raise UserError(
            f"the text has {len(ids)} tokens, and num_virtual_tokens={adapter.count} takes as many "
            "from it: take fewer, or a longer text"
        )
    rows = torch.tensor([ids], device=adapter.prompt_embeddings.device)
    with model.disable_adapter():
        cache = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=True)
    return initialize_kv_prefix_from_past_key_values(
        model, past_key_values=cache.past_key_values, adapter_name=adapter_name
    )


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any,
    *,
    past_key_values: Any,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Fill a prefix or cartridge with the first tokens of a cache of one row; return the table."""
    adapter = _held(model, adapter_name, num_virtual_tokens)
    table = cached_table(past_key_values, adapter.count)
    if tuple(table.shape) != adapter.size():
        raise UserError(
            f"the cache is of another model: its tokens have {table.shape[1]} numbers, the "
            f"adapter's {adapter.size()[1]}"
        )
    adapter.fill("prompt_embeddings", table)
    return table


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path
) -> None:
    """Write a cartridge that has the virtual tokens of several, one after the other.

    The frozen tokens are the first one's. UserError where they are of different models.
    """
    folders = [files.fetch(path) for path in adapter_paths]
    if len(folders) < 2:
        raise UserError(f"{len(folders)} cartridges are not to be composed: give two or more")
    configs = [files.read_config(folder) for folder in folders]
    first = configs[0]
    for folder, config in zip(folders, configs, strict=True):
        if not isinstance(first, CartridgeConfig) or not isinstance(config, CartridgeConfig):
            raise UserError(f"{folder} holds a {config.peft_type}, not a CARTRIDGE")
        for name in ("token_dim", "num_layers", "num_attention_heads", "task_type"):
            if getattr(config, name) != getattr(first, name):
                raise UserError(
                    f"{folder} has {name}={getattr(config, name)}, {folders[0]} "
                    f"{getattr(first, name)}: they are of different models"
                )
    from safetensors.torch import save

    tensors = [files.read_tensors(files.tensor_file(folder)) for folder in folders]
    table = torch.cat([found["prompt_embeddings"] for found in tensors])
    settings = first.replace(num_virtual_tokens=len(table)).to_dict()
    content = {
        files.TENSORS: save({"prompt_embeddings": table}, metadata={"format": "pt"}),
        files.CONFIG: json.dumps(settings, indent=2, sort_keys=True).encode(),
    }
    files.write_folder(output_path, content)


def _held(model: Any, name: str | None, count: int | None) -> Past:
    """Return the prefix or cartridge called `name`, else the active one, of `count` tokens."""
    roster = roster_of(model)
    chosen = model.active_adapter if name is None else name
    roster.check(chosen)
    for _, _, adapter in roster.adapters(chosen):
        if not isinstance(adapter, Past):
            continue
        if adapter.encoder is not None:
            raise UserError(
                "a network computes the keys and values, which cannot be told: leave "
                "prefix_projection out"
            )
        if count not in (None, adapter.count):
            raise UserError(f"num_virtual_tokens={count}, but {chosen!r} has {adapter.count}")
        return adapter
    raise UserError(
        f"{chosen!r} is a {roster.configs[chosen].method}: only PREFIX_TUNING and CARTRIDGE have "
        "keys and values"
    )
