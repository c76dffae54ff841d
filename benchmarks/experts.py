"""A mixture of experts with its experts packed: memory and time of a step beside 16 bits.

    python benchmarks/experts.py [--json FILE]

A random mixture (Qwen3-MoE's layers: hidden 1024, 32 experts of 512 in 6 layers, 8 a token, 327
million parameters) is written in bfloat16, and loaded in processes of their own in 16 bits and with
quantize: nf4. Each tells what its tensors hold, and the peak of its memory as the operating system
counts it, above what Python, torch and transformers take: while it loads, and then in one step of a
LoRA (r=16 on all linears, 256 tokens; `of_experts`: on the experts). Then both are in one process
and take steps in turns; the time is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from inlay.cli._machine import processor

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
MIB = 2**20
ROUNDS, TOKENS = 15, 256


def main() -> None:
    """Write the mixture, measure both, print and write what came out."""
    options = arguments()
    if options.inside:
        print(json.dumps(inside(*options.inside.split(","), experts=options.parameters)))
        return
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        run("write", folder)
        for kind in ("none", "nf4"):
            found[kind] = run(kind, folder) | {
                f"{key}_of_experts": value
                for key, value in run(kind, folder, "--parameters").items()
                if key.startswith("step")
            }
        found["turns"] = run("turns", folder)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run(what: str, folder: str, *more: str) -> dict[str, Any]:
    """Return what a process of its own tells."""
    given = [sys.executable, __file__, "--inside", f"{what},{folder}", *more]
    told = subprocess.run(given, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(told.splitlines()[-1])
    return result


def inside(what: str, folder: str, *, experts: bool) -> dict[str, Any]:
    """Write the mixture, or measure one kind of it, or both in turns."""
    import torch
    import transformers

    import inlay

    torch.set_num_threads(2)
    torch.manual_seed(0)
    if what == "write":
        return write(folder)
    ids = torch.arange(TOKENS)[None] % 500

    def made(kind: str) -> Any:
        base, _ = inlay.load_base(folder, quantize=kind, device="cpu")
        named: dict[str, Any] = {"target_modules": "all-linear"}
        if experts:
            named = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        return inlay.get_peft_model(base, inlay.LoraConfig(r=16, **named))

    def step(model: Any) -> float:
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        return time.perf_counter() - start

    if what == "turns":
        models = {kind: made(kind) for kind in ("none", "nf4")}
        for model in models.values():
            step(model)
        times = [{kind: step(model) for kind, model in models.items()} for _ in range(ROUNDS)]
        ratios = [each["nf4"] / each["none"] for each in times]
        seconds = {kind: statistics.median(each[kind] for each in times) for kind in models}
        return {"seconds": seconds, "nf4 / 16 bits": statistics.median(ratios), "ratios": ratios}
    transformers.Qwen3MoeForCausalLM  # noqa: B018  what it imports is not counted
    before = peak()
    model = made(what)
    held = sum(t.nbytes for t in model.get_base_model().state_dict().values())
    loaded = peak() - before
    forget_peak()
    step(model)
    return {"tensors_mib": held / MIB, "load_mib": loaded, "step_mib": peak() - before}


def write(folder: str) -> dict[str, Any]:
    """Write the mixture with random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = Qwen3MoeConfig(
        hidden_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=8,
        vocab_size=4096,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200MB")
    for file in Path(folder).glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())  # what is not on the disk yet cannot leave memory
    return {"parameters": sum(p.numel() for p in model.parameters())}


def machine() -> dict[str, Any]:
    """Return what this is measured on."""
    return {"cpu": processor()[0], "threads": 2, "torch": metadata.version("torch")}


def peak() -> float:
    """Return the most memory that was resident since `forget_peak`, in MiB."""
    told = Path("/proc/self/status").read_text("utf-8")
    return int(told.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Count the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--parameters", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
