"""A training run, killed with SIGKILL at random moments and resumed until it is done.

    python killed_run.py FOLDER KILLS SEED

Prints how many of KILLS rounds ended with the bits of the run that was left alone. Run as a process
of its own, so that the test's process is never forked while it holds threads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.checkpoint.train import newest_verified
from inlay.objectives.tokens import count_tokens, token_loss
from inlay.train.events import Events
from inlay.train.loop import fit
from inlay.train.settings import TrainConfig

STEPS = 12
CONFIG = TrainConfig(
    max_steps=STEPS,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    save_steps=1,
    eval_steps=4,
    precision="float32",
)


@dataclass(frozen=True)
class Tokens:
    """A row, and a batch of one or more of them of the same length."""

    input_ids: torch.Tensor
    row_id: str = ""
    rows: tuple[str, ...] = ()

    @property
    def labels(self) -> torch.Tensor:
        return self.input_ids

    def to(self, device: Any) -> Tokens:
        return replace(self, input_ids=self.input_ids.to(device))

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids}


class EveryToken:
    means = ("tokens",)

    def size(self, row: Tokens) -> int:
        return len(row.input_ids)

    def collate(self, rows: Any, tokenizer: Any) -> Tokens:
        return Tokens(torch.stack([r.input_ids for r in rows]), rows=tuple(r.row_id for r in rows))

    def prepare(self, policy: nn.Module, batch: Tokens) -> Tokens:
        return batch

    def counts(self, batch: Any) -> dict[str, torch.Tensor]:
        return count_tokens(batch)

    def loss(self, policy: nn.Module, batch: Any, norm: dict[str, torch.Tensor]) -> torch.Tensor:
        return token_loss(policy, batch, norm)


def build() -> nn.Module:
    """Return a random Llama of 2 layers of which the attention is trained, with dropout."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    return model


def train(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (20, 12), generator=generator)
    rows = [Tokens(row, f"rows.jsonl:{i + 1}") for i, row in enumerate(ids)]
    fit(build(), None, EveryToken(), rows[4:], rows[:4], CONFIG, folder, Events(folder), True)


def forked(folder: Path, kill_after: float | None = None) -> bool:
    """Train in a child; return whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            train(folder)
        except BaseException as error:
            print(f"the child failed: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit("a run failed that should not")
    return os.WIFEXITED(status)


def steps_written(folder: Path) -> list[int]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [e["step"] for e in map(json.loads, lines) if e["event"] == "step"]


def main(folder: Path, kills: int, seed: int) -> None:
    began = time.monotonic()
    forked(folder / "whole")
    length = time.monotonic() - began
    expected = newest_verified(folder / "whole" / "checkpoints")
    assert expected is not None
    chosen, equal, killed = random.Random(seed), 0, 0
    while killed < kills:
        shutil.rmtree(folder / "cut", ignore_errors=True)
        if forked(folder / "cut", chosen.uniform(0, length)):
            continue  # it was done before the kill came
        killed += 1
        forked(folder / "cut")
        found = newest_verified(folder / "cut" / "checkpoints")
        assert found is not None
        ours, theirs = found.tensors(), expected.tensors()
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
        left = [p.name for p in (folder / "cut" / "checkpoints").iterdir() if p.name[0] == "."]
        equal += same and not left and steps_written(folder / "cut") == list(range(1, STEPS + 1))
    print(f"{equal} of {killed}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
