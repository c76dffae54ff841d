"""QLoRA from bfloat16 shards: the memory of loading, and whole steps beside PEFT's.

    python benchmarks/qlora_beside.py load [--shape 1b] [--json FILE]
    python benchmarks/qlora_beside.py step [--shape 125m 1b] [--length 128 512] [--json FILE]

A Llama of random weights is written to a temporary folder in several bfloat16 shards. `load`: the
largest resident memory of a process that reads it with `quantize: nf4`. `step`: whole optimizer
steps with r=16 on all linears beside transformers + PEFT + bitsandbytes, each side a process of its
own that stands still while another works: the same codes, the same adapter, the same rows.
"inlay" trains as `inlay train` does; "plain" is the library alone in PEFT's place, in its loop.
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
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from qlora import SHAPES, llama, peak_mib

from inlay.cli._machine import processor

TIED = ("1b",)
"""Shapes whose head is the embedding, as that of Llama 3.2 1B is."""
SIDES = ("inlay", "plain", "peft")
MIB = 2**20


def main() -> None:
    """Run what was asked for, print it, and write it where asked."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.inside:
        return side(options)
    results: list[dict[str, Any]] = []
    for shape in options.shape:
        with tempfile.TemporaryDirectory() as place:
            written = {"shape": shape, **write(shape, Path(place))}
            if options.what == "load":
                results.append(loading(written, Path(place), options))
            else:
                results += [steps(shape, n, Path(place), options) for n in options.length]
    if options.json:
        machine = {"cpu": processor()[0], "threads": options.threads, "torch": torch.__version__}
        text = json.dumps({"machine": machine, "results": results}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def write(shape: str, folder: Path) -> dict[str, float]:
    """Write a Llama of this shape, four layers to a shard; return its size and largest tensor's."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config = llama(**SHAPES[shape], tie_word_embeddings=shape in TIED)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else None
        shard = "outside" if layer is None else f"layers-{int(layer) // 4}"
        shards.setdefault(f"model-{shard}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        tensors = {name: drawn(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    where = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    nbytes = [2 * size.numel() for size in shapes.values()]
    return {"checkpoint_mib": sum(nbytes) / MIB, "largest_mib": max(nbytes) / MIB}


def drawn(name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Return a weight as a new Llama has it, in bfloat16; a norm is of ones."""
    made = torch.ones(shape, dtype=torch.bfloat16)
    return made if "norm" in name else made.normal_(std=0.02, generator=generator)


def loading(written: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the memory of a process that loads the folder, beside what its model holds."""
    told = Side("inlay", folder, 0, options)
    found = written | told.ready
    told.close()
    limit = 1.2 * found["packed_mib"] + found["largest_mib"]
    found["limit_mib"] = limit
    for name in ("loaded_mib", "read_mib"):
        whole, above = found[name], found[name] - found["before_mib"]
        found[f"{name} / limit"] = [whole / limit, above / limit]
    print(json.dumps(found, indent=1))
    return found


def steps(shape: str, length: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, peaks and losses of the sides, which take turns, and their ratios.

    cpu: seconds of the processor, which say more than those of the clock where others use it too.
    """
    sides = {name: Side(name, folder, length, options) for name in options.sides}
    for turn in range(options.steps + 1):  # the first one warms up
        for name in options.sides if turn % 2 else reversed(options.sides):
            sides[name].step()
    found: dict[str, Any] = {"shape": shape, "length": length}
    found["checkpointing"] = length in options.checkpointing
    for name, one in sides.items():
        found[name] = one.ready | one.close()
        found[name] |= {key: [told[key] for told in one.told] for key in ("seconds", "cpu", "loss")}
    for key in ("seconds", "cpu"):
        for name in options.sides[:-1]:
            last = options.sides[-1]
            pairs = zip(found[last][key][1:], found[name][key][1:], strict=True)
            found[f"{key}, {last} / {name}"] = statistics.median(a / b for a, b in pairs)
    last = found[options.sides[-1]]
    for name in options.sides[:-1]:
        found[f"peak, {options.sides[-1]} / {name}"] = last["peak_mib"] / found[name]["peak_mib"]
        pairs = zip(last["loss"], found[name]["loss"], strict=True)
        found[f"losses apart, {name}"] = max(abs(a - b) for a, b in pairs)
    print(json.dumps(found), flush=True)
    return found


class Side:
    """A process that has loaded the base and makes a step when it is told to."""

    def __init__(self, name: str, folder: Path, length: int, options: argparse.Namespace) -> None:
        words = [sys.executable, __file__, options.what, "--inside", name, "--folder", str(folder)]
        words += ["--length", str(length), "--threads", str(options.threads)]
        words += ["--checkpointing", *map(str, options.checkpointing)]
        waiting = os.environ | {"OMP_WAIT_POLICY": "passive"}  # or the one takes the other's cores
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, env=waiting, **pipes)
        self.told: list[dict[str, float]] = []
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        """Return what the process tells next."""
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"a process ended before its time: {self.process.args}")

    def step(self) -> None:
        """Let it make a step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.told.append(self.answer())

    def close(self) -> dict[str, Any]:
        """End it and return the last that it tells."""
        self.process.stdin.close()
        found = self.answer()
        self.process.wait()
        return found


def side(options: argparse.Namespace) -> None:
    """Be one of the processes: load, tell, and make a step for each line that comes in."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (so that it is in `before`)

    load = load_peft if options.inside == "peft" else load_inlay
    before = resident_mib()
    model = load(options.folder)
    told = {"before_mib": before, "loaded_mib": peak_mib()}
    if options.what == "load":
        told["packed_mib"] = sum(tensor.nbytes for tensor in tensors(model)) / MIB
        for tensor in tensors(model):  # what only stands in a mapped file is read now
            tensor.view(-1).view(torch.uint8)[::4096].sum()
        print(json.dumps(told | {"read_mib": peak_mib()}), flush=True)
    else:
        model = tuned(model, options)
        print(json.dumps(told), flush=True)
        train(model, options.length[0], fast=options.inside == "inlay")
    print(json.dumps({"peak_mib": peak_mib()}), flush=True)


def load_inlay(folder: Path) -> Any:
    """Return the base in NF4 as inlay loads it."""
    import inlay

    return inlay.load_base(folder, quantize="nf4")[0]


def load_peft(folder: Path) -> Any:
    """Return the base in NF4 as transformers loads it with bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )


def tuned(model: Any, options: argparse.Namespace) -> Any:
    """Return the model with a LoRA of the side's library, whose A is drawn from a seed."""
    import peft

    import inlay

    library: Any = peft if options.inside == "peft" else inlay
    config = library.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = library.get_peft_model(model, config).train()
    if options.length[0] in options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return model


def train(model: Any, length: int, *, fast: bool) -> None:
    """Make a step on new random tokens for each line that comes in, and tell its time and loss.

    fast: by the objective and the fast paths of a run, in place of the model's own loss.
    """
    from inlay.data.collate import Batch
    from inlay.model.fast import fast_paths
    from inlay.objectives.pretrain import Pretrain

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(2)
    objective = Pretrain()
    shown = torch.arange(16)[None]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        # as `inlay train` and transformers' Trainer (bf16) compute over float32 adapters
        with torch.autocast("cpu", torch.bfloat16):
            if not fast:
                loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
                return loss
            batch = Batch(ids, ids, None, None, ("random",))
            return objective.loss(model, batch, objective.counts(batch))

    with fast_paths(model, lambda: loss_of(shown)) if fast else nullcontext():
        for _ in sys.stdin:
            ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
            start, used = time.perf_counter(), time.process_time()
            loss = loss_of(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            told = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}
            print(json.dumps(told | {"loss": loss.item()}), flush=True)


def tensors(model: Any) -> list[torch.Tensor]:
    """Return the model's parameters and buffers, each once."""
    found = [*model.parameters(), *model.buffers()]
    return list({t.data_ptr(): t for t in found if t.numel()}.values())


def resident_mib() -> float:
    """Return the resident memory of this process now, in MiB."""
    with open("/proc/self/statm", encoding="ascii") as told:
        return int(told.read().split()[1]) * os.sysconf("SC_PAGESIZE") / MIB


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("load", "step"))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b"])
    parser.add_argument("--length", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--checkpointing", nargs="*", type=int, default=[512], metavar="LENGTH")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side that count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["inlay", "peft"])
    parser.add_argument("--inside", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
