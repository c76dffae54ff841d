"""QLoRA on this machine: the 4-bit linear beside bitsandbytes', and what one step of a shape takes.

    python benchmarks/qlora.py linears [--json FILE]
    python benchmarks/qlora.py step --shape 7b --length 128 [--json FILE]
    python benchmarks/qlora.py linears --device cuda --json FILE
    python benchmarks/qlora.py step --device cuda --shape 70b --length 512 --cap 48 --json FILE

`linears`: forward and backward of a frozen linear, all three in turns in one process, quantized
from bfloat16: inlay's, bitsandbytes', and a plain bfloat16 one. `step`: one whole optimizer step of
a Llama shape with random codes, r=16 on all linears, in a process of its own, with the peak of its
memory as the operating system counts it. On a GPU torch counts: what tensors held at most, and what
was reserved for them; `--cap` is how many GiB it may reserve before it is out of memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inlay.cli._machine import processor

SHAPES: dict[str, dict[str, int]] = {
    # hidden, intermediate, layers, heads, key heads, vocabulary
    "125m": dict(zip(("h", "i", "n", "a", "k", "v"), (768, 2048, 12, 12, 12, 32000), strict=True)),
    "1b": dict(zip(("h", "i", "n", "a", "k", "v"), (2048, 8192, 16, 32, 8, 128256), strict=True)),
    "7b": dict(zip(("h", "i", "n", "a", "k", "v"), (4096, 11008, 32, 32, 32, 32000), strict=True)),
    "8b": dict(zip(("h", "i", "n", "a", "k", "v"), (4096, 14336, 32, 32, 8, 128256), strict=True)),
    "13b": dict(zip(("h", "i", "n", "a", "k", "v"), (5120, 13824, 40, 40, 40, 32000), strict=True)),
    "70b": dict(zip(("h", "i", "n", "a", "k", "v"), (8192, 28672, 80, 64, 8, 128256), strict=True)),
}
LINEARS = {
    "cpu": [(4096, 4096), (11008, 4096)],
    "cuda": [(4096, 4096), (11008, 4096), (28672, 8192)],
}
ROWS = {"cpu": (16, 128, 512, 2048), "cuda": (1, 4, 16, 32, 128, 512, 2048)}
MIB = 2**20


def main() -> None:
    """Run what was asked for and print it; write it where asked."""
    options = arguments()
    if options.device == "cpu":
        # it comes with the development's packages, and transformers loads it where it is there:
        # 80 MiB that a plain installation does not have
        sys.modules["triton"] = None  # type: ignore[assignment]
    torch.set_num_threads(options.threads)
    if options.what == "linears":
        shapes, rows = LINEARS[options.device], ROWS[options.device]
        results: Any = [linear(o, i, n, options.device) for o, i in shapes for n in rows]
    elif options.inside:
        print(json.dumps(step(options)))
        return
    else:
        given = [sys.executable, __file__, *sys.argv[1:], "--inside"]
        told = subprocess.run(given, check=True, stdout=subprocess.PIPE, text=True).stdout
        results = [json.loads(told.splitlines()[-1])]
        print(results[0])
    if options.json:
        machine = {"cpu": processor()[0], "threads": options.threads, "torch": torch.__version__}
        if options.device == "cuda":
            machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        text = json.dumps({"machine": machine, "results": results}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def linear(outputs: int, inputs: int, rows: int, device: str = "cpu") -> dict[str, Any]:
    """Return the median milliseconds of forward and backward of each, and their ratios."""
    import bitsandbytes as bnb

    from inlay.bases.nf4 import PackedLinear

    plain = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device=device)
    plain.requires_grad_(False)
    packed = PackedLinear.of(plain)
    theirs = bnb.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    theirs.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    theirs = theirs.to(device)
    given: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    x = torch.randn(rows, inputs, **given).requires_grad_()
    grad = torch.randn(rows, outputs, **given)
    sides = {"inlay": packed, "bitsandbytes": theirs, "bfloat16": plain}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1 + (12 if device == "cpu" else 100)):
        for name, side in sides.items():
            start = time.perf_counter()
            side(x).backward(grad)
            wait(device)
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    middle = {name: statistics.median(found) for name, found in times.items()}
    over = {
        "bitsandbytes / inlay": statistics.median(
            b / a for a, b in zip(times["inlay"], times["bitsandbytes"], strict=True)
        ),
        "inlay / bfloat16": statistics.median(
            a / b for a, b in zip(times["inlay"], times["bfloat16"], strict=True)
        ),
    }
    told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in middle.items())
    print(f"{outputs}x{inputs}, {rows} rows: {told}; {over}")
    return {"shape": [outputs, inputs], "rows": rows, "ms": middle, "ratios": over}


def step(options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds a step and peak memory of training a shape with random codes."""
    import inlay
    from inlay.data.collate import Batch
    from inlay.objectives.tokens import count_tokens, token_loss

    name, length, device = options.shape, options.length, options.device
    if options.cap:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * 1024 * MIB / whole))
    model = base(device, **SHAPES[name])
    loaded = {f"loaded_{k.removeprefix('peak_')}": v for k, v in held(device).items()}
    tuned = inlay.get_peft_model(model, inlay.LoraConfig(r=16, target_modules="all-linear")).train()
    tuned.gradient_checkpointing_enable({"use_reentrant": False})
    tuned.enable_input_require_grads()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(SHAPES[name]["v"], (1, length), device=device)
    batch = Batch(ids, ids, None, torch.arange(length, device=device)[None], ("random",))
    seconds = []
    with fast(tuned, ids):
        for _ in range(options.steps):
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16):
                loss = token_loss(tuned, batch, count_tokens(batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wait(device)
            seconds.append(time.perf_counter() - start)
    return {
        "shape": name,
        "length": length,
        "trained": sum(p.numel() for p in trained),
        "seconds": seconds,
        **loaded,
        **held(device),
        "loss": loss.item(),
    }


def fast(model: Any, ids: torch.Tensor) -> AbstractContextManager[Any]:
    """Let the model compute as a run lets it, for a `with` block."""
    from inlay.model.fast import fast_paths

    def run() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            model(input_ids=ids[:, :16], use_cache=False)

    return fast_paths(model, run)


def llama(h: int, i: int, n: int, a: int, k: int, v: int, **others: Any) -> Any:
    """Return the configuration of a Llama of these sizes, in bfloat16."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=h,
        intermediate_size=i,
        num_hidden_layers=n,
        num_attention_heads=a,
        num_key_value_heads=k,
        vocab_size=v,
        dtype="bfloat16",
        **others,
    )


def base(device: str = "cpu", **sizes: int) -> Any:
    """Return a Llama of these sizes, its linears in random codes, the rest in bfloat16."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from inlay.bases.nf4 import PackedLinear
    from inlay.kernels.allocator import return_freed

    if device == "cpu":
        return_freed()  # as load_base does for a packed base
    config = llama(**sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            o, j = module.weight.shape
            packed = PackedLinear(j, o, bias=False, dtype=torch.bfloat16, device=device)
            packed.weight.random_(256)
            packed.absmax.random_(256)
            packed.nested_absmax.fill_(0.02)
            packed.offset = 0.04
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed)
        elif isinstance(module, nn.Embedding | nn.Linear):
            weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device)
            module.weight = nn.Parameter(weight.normal_(std=0.02), requires_grad=False)
        elif "RMSNorm" in type(module).__name__:
            ones = torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device)
            module.weight = nn.Parameter(ones, requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model


def wait(device: str) -> None:
    """Wait until a GPU has done what it was told to."""
    if device == "cuda":
        torch.cuda.synchronize()


def held(device: str) -> dict[str, float]:
    """Return the largest memory so far in MiB: of the process, and what torch counts of a GPU's."""
    found = {"peak_mib": peak_mib()}
    if device == "cuda":
        found["allocated_mib"] = torch.cuda.max_memory_allocated() / MIB
        found["reserved_mib"] = torch.cuda.max_memory_reserved() / MIB
    return found


def peak_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("linears", "step"))
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cap", type=float, help="GiB of a GPU's memory that may be reserved")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device that torch can use")
    if options.cap is not None and (options.device != "cuda" or options.cap <= 0):
        parser.error("--cap is a positive number of GiB, and goes with --device cuda")
    return options


if __name__ == "__main__":
    main()
