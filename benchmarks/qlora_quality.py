"""What 4 bits cost in quality: held-out losses of LoRA over a base in NF4 and in 16 bits; merging.

    python benchmarks/qlora_quality.py tiny [--seeds 1 2 3 4 5] [--json FILE]
    python benchmarks/qlora_quality.py encoder [--seeds 1 2 3] [--json FILE]
    python benchmarks/qlora_quality.py merge [--json FILE]

`tiny`: three tasks on the embedded base, whose losses end far from zero; `encoder`: docstrings
classified by the pretrained sentence encoder, as in `comparisons.py`. Both sides of a pair differ
in `quantize` alone: the same rows in the same order, the same start of the adapter. `merge`: how
far a base in NF4 with its adapter, and the same merged, agree on the next token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch; others use the machine too

import torch
from comparisons import DOCSTRINGS, encoder
from qlora import SHAPES, llama

import inlay
from inlay.cli._machine import processor
from inlay.run.report import JsonLines

ROOT = Path(__file__).parent.parent
MAILS = ROOT / "recipes" / "data" / "support.jsonl"
LORA = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
SIDES = ("none", "nf4")


def main() -> None:
    """Run what was asked for, print it, and write it where asked."""
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        if options.what == "merge":
            results = merges(Path(place))
        else:
            tasks = tiny(Path(place)) if options.what == "tiny" else classified(Path(place))
            chosen = [name for name in tasks if options.task in (None, name)]
            results = [pair(name, tasks[name], options.seeds, Path(place)) for name in chosen]
    if options.json:
        machine = {"cpu": processor()[0], "threads": options.threads, "torch": torch.__version__}
        text = json.dumps({"machine": machine, "results": results}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def tiny(place: Path) -> dict[str, dict[str, Any]]:
    """Return the recipes on the embedded base: answers and whole mails of the demo, and texts.

    Digits and names of a mail are free, so a loss over all of its tokens stays above one nat.
    """
    texts = {"path": docstrings(place) / "train.jsonl", "eval_path": place / "dev.jsonl"}
    texts = {key: str(path) for key, path in texts.items()} | {"format": "text", "max_length": 128}
    mails = {"path": str(MAILS), "eval_fraction": 0.1}
    told = {
        "answers, 20 steps": (mails, "sft", 20),
        "answers, 90 steps": (mails, "sft", 90),
        "whole mails, 90 steps": (mails | {"train_on": "all"}, "sft", 90),
        "docstrings, 300 steps": (texts, "pretrain", 300),
    }
    return {
        name: {
            "data": data,
            "objective": objective,
            "adapter": LORA,
            "train": settings(max_steps=steps, learning_rate=5e-3),
            "evaluate": {"answers": 0},
        }
        for name, (data, objective, steps) in told.items()
    }


def classified(place: Path) -> dict[str, dict[str, Any]]:
    """Return the two recipes on the encoder: that of `comparisons.py`, and LoRA everywhere."""
    import yaml

    recipe = yaml.safe_load(DOCSTRINGS.format(base=encoder(), data=docstrings(place)))
    everywhere = LORA | {"modules_to_save": None}
    return {"pooler whole": recipe, "all-linear": recipe | {"adapter": everywhere}}


def docstrings(place: Path) -> Path:
    """Write the rows of `tools/make_docstrings.py` into `place` and return it."""
    maker = ROOT / "tools" / "make_docstrings.py"
    subprocess.run([sys.executable, str(maker), str(place)], check=True, capture_output=True)
    return place


def settings(**given: Any) -> dict[str, Any]:
    """Return the settings of training that all tasks on the embedded base share."""
    rows = {"micro_batch_size": 16, "gradient_accumulation_steps": 1, "eval_batch_size": 64}
    return rows | {"save_steps": None} | given


def pair(name: str, recipe: Mapping[str, Any], seeds: Sequence[int], place: Path) -> dict[str, Any]:
    """Return the held-out scores of both sides for each seed, and the ratio of their losses."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    base: dict[str, float] = {}
    for seed in seeds:
        for side in SIDES:
            run = train(recipe, side, seed, place / name / f"{side}-{seed}")
            scores = run.evaluation["adapter"]
            kept = {key: scores[key] for key in ("loss", "accuracy") if key in scores}
            found[side].append(kept)
            base[side] = run.evaluation["base"]["loss"]
        losses = [found[side][-1]["loss"] for side in SIDES]
        print(f"{name}, seed {seed}: 16 bits {losses[0]:.4f}, NF4 {losses[1]:.4f}", flush=True)
    losses = {side: [scores["loss"] for scores in found[side]] for side in SIDES}
    means = {side: statistics.mean(losses[side]) for side in SIDES}
    ratios = [b / a for a, b in zip(*losses.values(), strict=True)]
    spread = statistics.stdev(ratios) if len(ratios) > 1 else None
    print(f"{name}: {means['nf4'] / means['none']:.4f} of 16 bits; each {ratios}", flush=True)
    return {
        "task": name,
        "steps": recipe["train"]["max_steps"],
        "seeds": list(seeds),
        "base_loss": base,
        "scores": found,
        "mean_loss": means,
        "ratio_of_means": means["nf4"] / means["none"],
        "ratio_by_seed": ratios,
        "spread_of_ratio": spread,
    }


def train(recipe: Mapping[str, Any], side: str, seed: int, folder: Path) -> Any:
    """Return the run of `recipe` over its base in 16 bits (none) or NF4."""
    return inlay.train(
        {**recipe, "train": {**recipe["train"], "seed": seed}},
        quantize=side,
        dtype="bfloat16",
        output_dir=str(folder),
        report=JsonLines(StringIO()),
    )


def merges(place: Path) -> list[dict[str, Any]]:
    """Return how far merged and unmerged models agree, trained ones and one of random weights."""
    from inlay.data.dataset import prepare

    results = []
    tasks = tiny(place)
    for name in ("answers, 90 steps", "whole mails, 90 steps", "docstrings, 300 steps"):
        run = train(tasks[name], "nf4", 1, place / f"merge {name}")
        rows = prepare(run.config.data, inlay.load_base()[1]).eval[:200]
        results.append(merge(f"inlay-tiny, {name}", run.config.base_model, run.adapter, rows))
    base, adapter, rows = random_shape("125m", place)
    results.append(merge("125M of random weights", base, adapter, rows))
    return results


def merge(name: str, base: Any, adapter: Path, rows: Sequence[Any]) -> dict[str, Any]:
    """Return the agreements of a merged model with the unmerged one.

    float32: computed in float32 throughout. rounded, rounded to float16: the merged weights were
    rounded once to bfloat16 as they are written, or to float16. bfloat16: both are also computed
    in it. rounding alone: the
    unmerged model, computed in bfloat16 and in float32, for what the last one has of arithmetic.
    """
    from inlay.run.agreement import compare, says

    model = opened(base, adapter, "float32")
    before = says(model, rows)
    plain = model.merge_and_unload()
    found = {"float32": compare(before, says(plain, rows))}
    found["rounded to float16"] = compare(before, says(deepcopy(plain).half().float(), rows))
    rounded = plain.bfloat16().float()  # the norms and embeddings were of 16 bits before
    found["rounded"] = compare(before, says(rounded, rows))
    model = opened(base, adapter, "bfloat16")
    short = says(model, rows)
    found["bfloat16"] = compare(short, says(model.merge_and_unload(), rows))
    found["rounding alone"] = compare(before, short)
    for how, agreement in found.items():
        print(f"{name}, {how}: {agreement.told()}", flush=True)
    told = {how: {"top1": a.top1, "kl": a.kl, "tokens": a.tokens} for how, a in found.items()}
    return {"model": name, "agreement": told}


def opened(base: Any, adapter: Path, dtype: str) -> Any:
    """Return the base in NF4, computed in `dtype`, with its adapter."""
    model = inlay.load_base(base, quantize="nf4", dtype=dtype)[0]
    return inlay.PeftModel.from_pretrained(model, str(adapter)).eval()


def random_shape(shape: str, place: Path) -> tuple[str, Path, list[Any]]:
    """Return the folders of a random Llama and of a random adapter for it, and random rows."""
    from transformers import LlamaForCausalLM

    from inlay.data.example import Example
    from inlay.data.rows import Source

    torch.manual_seed(0)
    folder, adapter = place / shape, place / f"{shape}-adapter"
    LlamaForCausalLM(llama(**SHAPES[shape])).bfloat16().save_pretrained(folder)
    base = inlay.load_base(folder, quantize="nf4")[0]
    config = inlay.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = inlay.get_peft_model(base, config)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:  # with A's start, an update of a sixth of the weights' size
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(str(adapter))
    drawn = torch.randint(SHAPES[shape]["v"], (16, 33)).tolist()
    rows = [Example(row, [-100, *row[1:]], "", Source("", 0)) for row in drawn]
    return str(folder), adapter, rows


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("tiny", "encoder", "merge"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--task", help="one of them alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
