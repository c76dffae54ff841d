"""A training step of inlay beside TRL's SFTTrainer over PEFT, in time, memory and losses.

    python benchmarks/train.py                                    the 135M shape, in bfloat16
    python benchmarks/train.py --shape 25m,135m --precision float32,bfloat16 --rounds 5
    python benchmarks/train.py --checkpointing off,on             activations kept, and made again
    python benchmarks/train.py --methods                          each method beside PEFT's own
    python benchmarks/train.py --losses 50                        how far the losses part

Each side is a process of its own (`train_sides.py`) with the same rows, weights, start, optimizer
and threads; they make their steps in turns, so that a busy machine slows all alike. A ratio above 1
says that inlay is faster. "useful" is `train_shapes.useful_flop` over a plain product's rate, which
is measured in the same process before and after each step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from train_shapes import SHAPES, rows, useful_flop
from train_sides import METHODS, SEED

from inlay.cli._machine import KEPT, PRODUCTS, processor

HERE = Path(__file__).parent
SIDES = ("inlay", "trl", "trl-free")


def main() -> None:
    """Measure each combination that was asked for, print it, and write it where asked."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.losses:
        options.rounds, options.steps, options.warmup = 1, options.losses, 0
        options.precision, options.sides = ["float32"], ["inlay", "trl"]
    elif options.methods:
        options.method, options.sides = list(METHODS), ["inlay", "trl"]
    cells = itertools.product(
        options.shape, options.precision, options.checkpointing, options.method
    )
    for shape, precision, checkpointing, method in cells:
        cell = measure(options, shape, precision, checkpointing == "on", method)
        show(cell)
        if options.json:
            keep(options.json, cell)


def measure(
    options: argparse.Namespace, shape: str, precision: str, checkpointing: bool, method: str
) -> dict[str, Any]:
    """Return the figures of all sides of one combination."""
    base = options.work / shape
    job = {
        "shape": shape,
        "method": method,
        "dtype": precision,
        "checkpointing": checkpointing,
        "batch": options.batch,
        "accumulate": options.accumulate,
        "total": options.warmup + options.rounds * options.steps,
        "measured": not options.losses,
        "base": str(base),
        "start": str(options.work / f"{shape}-{method}.safetensors"),
        "set": dict(options.set),
    }
    environment = settings(options.threads)
    subprocess.run(
        words({**job, "side": "prepare"}), check=True, env=environment, stderr=subprocess.DEVNULL
    )
    steps: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    with ExitStack() as stack:
        sides = {
            side: stack.enter_context(started({**job, "side": side}, environment))
            for side in options.sides
        }
        for turn in range(job["total"]):
            # who goes first changes from round to round
            turns = list(sides) if turn // options.steps % 2 else list(reversed(sides))
            for side in turns:
                told = answer(sides[side], "step")
                if turn >= options.warmup:
                    steps[side].append(told)
                seconds, loss = told["seconds"], told["loss"]
                print(f"  {turn} {side:9} {seconds:8.2f} s  loss {loss:.5f}", file=sys.stderr)
    facts = json.loads(Path(job["start"]).with_suffix(".json").read_text())
    return {
        **{name: job[name] for name in ("shape", "method", "dtype", "checkpointing", "set")},
        "rows_a_step": options.batch * options.accumulate,
        "threads": options.threads,
        "machine": f"{processor()[0]}, {os.cpu_count()} cores",
        "versions": versions(),
        **figures(steps, job, options, facts),
    }


def settings(threads: int) -> dict[str, str]:
    """Return the environment of both sides: theirs of the machine is what `inlay train` sets."""
    return {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
        **dict.fromkeys(KEPT, str(PRODUCTS)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }


def words(job: dict[str, Any]) -> list[str]:
    """Return the command of a side."""
    return [sys.executable, str(HERE / "train_sides.py"), json.dumps(job)]


@contextmanager
def started(job: dict[str, Any], environment: dict[str, str]) -> Iterator[Any]:
    """Start a side, wait until its model is there, and let it end or end it afterwards."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            words(job),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            answer(child)
            yield child
            child.stdin.close()  # type: ignore[union-attr]
            child.wait(timeout=600)
        except Exception:
            errors.seek(0)
            sys.stderr.write(errors.read()[-4000:])
            raise
        finally:
            child.kill()
            child.wait()


def answer(child: Any, word: str = "") -> dict[str, Any]:
    """Return what a side answers to `word`."""
    if word:
        child.stdin.write(word + "\n")
        child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise RuntimeError("a side ended before its time; its last words are below")
    return dict(json.loads(line))


def figures(
    steps: dict[str, list[dict[str, Any]]],
    job: dict[str, Any],
    options: argparse.Namespace,
    facts: dict[str, int],
) -> dict[str, Any]:
    """Return each side's speed, memory and losses, and the ratios between them."""
    flop = work_of(job, options, facts)
    sides: dict[str, dict[str, Any]] = {}
    for side, made in steps.items():
        useful = [1e-9 * f / s["seconds"] for f, s in zip(flop, made, strict=True)]
        shares = [u / s["gemm"] for u, s in zip(useful, made, strict=True) if s["gemm"]]
        sides[side] = {
            "tokens_per_s": sum(s["tokens"] for s in made) / sum(s["seconds"] for s in made),
            "seconds": [s["seconds"] for s in made],
            "useful_gflops": statistics.median(useful),
            "gemm_gflops": statistics.median(s["gemm"] for s in made),
            "of_gemm": statistics.median(shares) if shares else None,
            "losses": [s["loss"] for s in made],
            **{name: made[-1][name] for name in ("imported_mib", "loaded_mib", "peak_mib")},
        }
    ratios, mine = {}, steps["inlay"]
    for side, other in steps.items():
        found = []
        for first in range(0, len(mine), options.steps):
            part = slice(first, first + options.steps)
            found.append(
                sum(s["seconds"] for s in other[part]) / sum(s["seconds"] for s in mine[part])
            )
        ratios[side] = {
            "faster": [statistics.median(found), min(found), max(found)],
            "leaner": sides[side]["peak_mib"] / sides["inlay"]["peak_mib"],
            "losses_apart": max(
                abs(a["loss"] / b["loss"] - 1) for a, b in zip(mine, other, strict=True)
            ),
        }
    del ratios["inlay"]
    return {"sides": sides, "over": ratios}


def work_of(job: dict[str, Any], options: argparse.Namespace, facts: dict[str, int]) -> list[float]:
    """Return the useful operations of each measured step."""
    from inlay.train.order import Order

    config = json.loads((Path(job["base"]) / "config.json").read_text())
    size = options.batch * options.accumulate
    made = rows(job["total"] * size, config["vocab_size"])
    order = Order(len(made), size, SEED)
    return [
        useful_flop([made[i] for i in order.indices(step)], facts)
        for step in range(options.warmup, job["total"])
    ]


def show(cell: dict[str, Any]) -> None:
    """Print a combination."""
    checkpointing = ", checkpointing" if cell["checkpointing"] else ""
    print(f"{cell['shape']} {cell['method']} {cell['dtype']}{checkpointing}")
    for side, s in cell["sides"].items():
        share = f"{s['of_gemm']:4.0%} of GEMM {s['gemm_gflops']:.0f}" if s["of_gemm"] else ""
        print(
            f"  {side:9} {s['tokens_per_s']:7.1f} tokens/s  {s['useful_gflops']:6.1f} GFLOP/s "
            f"{share}  peak {s['peak_mib']:6.0f} MiB (loaded {s['loaded_mib']:.0f}, "
            f"imported {s['imported_mib']:.0f})"
        )
    for side, over in cell["over"].items():
        middle, low, high = over["faster"]
        print(
            f"  over {side:9} {middle:5.2f} [{low:.2f}..{high:.2f}]  memory 1/{over['leaner']:.2f}"
            f"  losses apart {over['losses_apart']:.1e}",
            flush=True,
        )


def keep(path: Path, cell: dict[str, Any]) -> None:
    """Put `cell` in the file, in place of an older one of the same combination."""
    cells = json.loads(path.read_text("utf-8")) if path.is_file() else []
    names = (
        "shape",
        "method",
        "dtype",
        "checkpointing",
        "set",
        "rows_a_step",
        "threads",
        "machine",
    )
    cells = [old for old in cells if any(old[n] != cell[n] for n in names)]
    path.write_text(json.dumps([*cells, cell], indent=1) + "\n", encoding="utf-8")
    from train_plot import plot

    plot([*cells, cell], path.with_suffix(".png"))


def versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "inlay")}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def some(*allowed: str) -> Any:
        def read(text: str) -> list[str]:
            given = text.split(",")
            unknown = [word for word in given if word not in allowed]
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
            return given

        return read

    def pair(text: str) -> tuple[str, Any]:
        name, _, value = text.partition("=")
        return name, json.loads(value)

    add = parser.add_argument
    add("--shape", type=some(*SHAPES), default=["135m"], help=", ".join(SHAPES))
    add("--precision", type=some("float32", "bfloat16"), default=["bfloat16"])
    add("--checkpointing", type=some("off", "on"), default=["off"], help="of both sides: off,on")
    add("--method", type=some(*METHODS), default=["lora"], help=", ".join(METHODS))
    add("--methods", action="store_true", help="all methods, beside PEFT's own")
    add("--losses", type=int, metavar="N", help="N steps of each side in float32: their losses")
    add("--sides", type=some(*SIDES), default=list(SIDES), help="inlay,trl,trl-free")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=1, help="steps of each side a round")
    add("--warmup", type=int, default=1, help="steps of each side before the first round")
    add("--batch", type=int, default=4, help="rows to a forward pass")
    add("--accumulate", type=int, default=1, help="forward passes to a step")
    add("--threads", type=int, default=2)
    add("--set", type=pair, action="append", default=[], metavar="KEY=JSON")
    add("--json", type=Path, help="a file of results, which this is added to; a plot beside it")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "inlay-benchmark")
    return parser.parse_args()


if __name__ == "__main__":
    main()
