"""docs/methods.md, from what the laws find: `python -m tests.laws.methods_table` writes it.

A mark in the table is a law that held just now on a small layer, a count is of parameters made on
the meta device: nothing in it is claimed by hand. `test_methods_table.py` fails where the page in
docs is another.
"""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.bases import view
from inlay.core.adapter import Adapter, Reweight
from inlay.core.base import Base, PackedModule
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError
from inlay.core.inlaid import Adapted, Inlaid
from inlay.core.selection import BASE, Selection
from inlay.methods import method, names
from inlay.model.roster import Roster
from tests.laws.samples import SAMPLES, fold, sampled
from tests.methods.bases import build, llama, settings_of_methods

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
KINDS = ("linear", "4-bit", "conv", "embedding", "norm")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"lora, use_dora": ("lora", {"use_dora": True})}
"""Rows beside the registry's: title -> (method, settings)."""
HEAD = """# Methods

Written by the law tests (`python -m tests.laws.methods_table`): a mark is a law that held when this
page was made, and the tests fail where it no longer does.

**Parameters** are those that train on the shape of Llama-3.2-3B ({base:,} parameters) with the
method's own defaults, counted on the meta device; where a method needs a setting, or takes a layer
that this model has not, the row says so.
**Merge**: a weight says the method, and the merged layer computes the same to 1e-10 (float64).
**Unmerge**: the weight comes back to the bit. **Rows**: rows of one batch with different adapters
each compute what they would alone. **Stack**: it computes over, and under, another adapter.
**Layers**: the kinds it can be set into. **PEFT file**: PEFT's files of it load here and ours load
there, with equal logits (`tests/methods/test_beside_peft.py`). 4-bit is a linear in NF4 codes.

| method | equation | paper | parameters | merge | unmerge | rows | stack | layers | PEFT file |
|---|---|---|---:|---|---|---|---|---|---|
"""


def write() -> str:
    """Return the page."""
    base = llama_3b()
    rows = [(name, name, {}) for name in names()]
    rows += [(title, *of) for title, of in VARIANTS.items()]
    size = sum(p.numel() for p in base.parameters())
    lines = [row(title, name, extra, base) for title, name, extra in sorted(rows)]
    return HEAD.format(base=size) + "\n".join(lines) + "\n"


def row(title: str, name: str, extra: dict[str, Any], base: nn.Module) -> str:
    """Return one line of the table."""
    source, equation = words(name, extra)
    apart = getattr(settings_of_methods().get(name), "APART", None)
    if apart:  # what a single adapter on a single layer cannot show
        cells = [f"[{title}](methods/{name}.md)", f"`{equation}`", source]
        cells += ["those of its parts", "no", "no", *["see the page"] * 2, "the model", "yes"]
        return f"| {' | '.join(cells)} |"
    settings = needed(name) | extra
    found = laws(method(name).config(**small(name) | extra))
    marks = ["yes" if found[law] else "no" for law in ("merge", "unmerge", "rows", "stack")]
    page = f"[{title}](methods/{name}.md)"
    cells = [
        page,
        f"`{equation}`".replace("|", r"\|"),
        source,
        parameters(base, name, settings),
        *marks,
        ", ".join(found["kinds"]) or "the model",
        "yes" if compared(name) else "inlay's own",
    ]
    return f"| {' | '.join(cells)} |"


def words(name: str, extra: dict[str, Any]) -> tuple[str, str]:
    """Return paper and equation, as the docstring of the method's file opens with them."""
    chosen = method(name).of(method(name).config(**extra)) if extra else None
    file = chosen.__module__ if chosen else f"inlay.methods.{name}"
    doc = importlib.import_module(file).__doc__ or ""
    equation = re.sub(r"^[^:]*: ", "", doc.split("\n", 1)[0])
    equation = re.split(r"\s*\([^()]*arXiv|   ", equation)[0].rstrip(" .,:")
    arxiv = re.search(r"arXiv:(\d{4}\.\d{4,5})", doc)
    if arxiv:
        return f"[{arxiv[1]}](https://arxiv.org/abs/{arxiv[1]})", equation
    page = re.search(r"(openreview\.net/\S+?)[:;,.)\s]", doc)
    return (f"[OpenReview](https://{page[1]})" if page else "-"), equation


def llama_3b() -> Any:
    """Return a model of Llama-3.2-3B's shape, without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=128_256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(shape)


def parameters(base: Any, name: str, settings: dict[str, Any]) -> str:
    """Return how many parameters train, with the settings that were needed."""
    if method(name).adapter is None:
        return f"{sum(p.numel() for p in base.parameters()):,}"
    roster = Roster(base)
    told = ", ".join(f"{k}={v}" for k, v in settings.items())
    try:
        made = roster.add("a", method(name).config(**settings), device=torch.device("meta"))
    except UserError as error:
        return str(error).split(":", 1)[0].split(";", 1)[0]
    held = {id(p): p for adapter in made.values() for p in adapter.parameters() if p.requires_grad}
    roster.remove("a")
    count = f"{sum(p.numel() for p in held.values()):,}"
    return f"{count} ({told})" if told else count


def compared(name: str) -> bool:
    """Return whether the method stands beside PEFT's in the tests."""
    module = settings_of_methods().get(name)
    return bool(module and module.PEFT)


def small(name: str) -> dict[str, Any]:
    """Return settings that small layers can take."""
    module = settings_of_methods().get(name)
    return dict(module.LAWS[0]) if module else {}


def needed(name: str) -> dict[str, Any]:
    """Return the settings without which the method has no meaning, as its file of tests says."""
    return dict(getattr(settings_of_methods().get(name), "NEEDED", {}))


def laws(config: AdapterConfig) -> dict[str, Any]:
    """Return which laws hold of a configuration, each tried on every kind of layer it takes."""
    kind = method(config.method).of(config)
    if kind is None:  # the base itself trains: there is nothing to merge, stack or choose by row
        return dict.fromkeys(("merge", "unmerge", "rows", "stack"), False) | {"kinds": ["the base"]}
    if getattr(config, "rooted", False):
        return at_the_root(config) | {"kinds": []}
    if kind.on == {"module"}:  # a block of a model, which no sampled layer is
        return at_the_root(config) | {"kinds": ["block"]}
    tried: dict[str, dict[str, bool]] = {}
    for name in SAMPLES:
        module, x = sampled(name)
        base = view(module)
        shown = "4-bit" if isinstance(module, PackedModule) else base.kind
        if base.kind not in kind.on or shown in tried:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                tried[shown] = on_a_layer(kind, config, base, x)
        except (UserError, UserWarning):  # of a size that the method does not take; others follow
            continue
    kinds = [k for k in KINDS if k in tried] + (["block"] if "module" in kind.on else [])
    held = {law: all(found[law] for found in tried.values()) for law in next(iter(tried.values()))}
    return held | {"kinds": kinds}


def on_a_layer(kind: type[Adapter], config: Any, base: Base, x: torch.Tensor) -> dict[str, bool]:
    """Return which laws hold on one layer."""
    other = method("lora").config(r=2)
    above = method("lora").adapter if base.kind != "norm" else kind
    pairs = [(kind, config), (above, other if base.kind != "norm" else config)]
    adapters = []
    for seed, (cls, settings) in enumerate(pairs):
        assert cls is not None
        adapter = cls(settings, base).eval()
        torch.manual_seed(seed)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        adapters.append(adapter)
    first, second = adapters
    host = Inlaid(base, Selection())  # type: ignore[arg-type]
    host.adapters.update({"a": first, "b": second})
    ran = {}
    for chosen in ((), ("a",), ("b",), ("a", "b"), ("b", "a")):
        with host.selection.using(active=chosen):
            ran[chosen] = host(x)
    rows = ("b", BASE, "a")
    with host.selection.using(rows=rows):
        mixed = host(x)
    alone = [ran[() if r == BASE else (r,)][i] for i, r in enumerate(rows)]
    stacked = second(Adapted(first, base), x), first(Adapted(second, base), x)
    found = {
        "rows": same(mixed, torch.stack(alone)),
        "stack": same(ran[("a", "b")], stacked[0]) and same(ran[("b", "a")], stacked[1]),
        "merge": False,
        "unmerge": False,
    }
    if isinstance(first, Reweight):
        before = base.weight().clone()
        meant = base.apply(x, *fold(host.base_layer, first))
        host.merge(("a",))
        with host.selection.using(active=("a",)):
            host.selection.merged = ("a",)
            found["merge"] = same(host(x), ran[("a",)]) and same(ran[("a",)], meant)
            host.selection.merged = ()
        host.unmerge()
        found["unmerge"] = torch.equal(base.weight(), before)
    return found


def at_the_root(config: Any) -> dict[str, Any]:
    """Return which laws hold of what stands before the whole model."""
    model = build(llama)
    roster = Roster(model)
    roster.add("a", config)
    roster.add("b", config)
    roster.add("other", method("lora").config(r=2))
    for name in ("a", "b", "other"):
        for _, _, adapter in roster.adapters(name):
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 18).reshape(3, 5)
    ran = {}
    with torch.no_grad():
        for chosen in ((), ("a",), ("b",), ("other",), ("other", "a")):
            roster.select(chosen)
            ran[chosen] = model(ids).logits[:, -5:]
        rows = True
        try:
            for names_of_rows in (("b", "a", "b"), ("b", BASE, "other")):
                with roster.selection.using(rows=names_of_rows):
                    mixed = model(ids).logits[:, -5:]
                alone = [ran[() if r == BASE else (r,)][i] for i, r in enumerate(names_of_rows)]
                rows = rows and same(mixed, torch.stack(alone))
        except UserError:
            rows = False
    stack = not same(ran[("other", "a")], ran[("a",)])
    try:
        roster.merge(("a",))
    except UserError:
        return {"merge": False, "unmerge": False, "rows": rows, "stack": stack}
    raise AssertionError(f"{config.method} merged, though it stands before the model")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two outputs are the same but for rounding."""
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9 if one.dtype == torch.float64 else 1e-4)


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
    print(f"{PAGE}: {len(names())} methods")
