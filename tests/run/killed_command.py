"""`inlay train`, killed with SIGKILL at random moments and started again until it is done.

    python killed_command.py FOLDER KILLS SEED

Prints how many of KILLS rounds ended with the adapter and the scores of the run that was left
alone. A process of its own, so that the test's process is never forked while it holds threads; the
libraries are imported once, before the forks.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

# imported here, once, and not in every fork: what a run imports while it goes
import matplotlib.backends.backend_agg
import rich.table
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama

from inlay.cli import main as inlay
from inlay.run import Run

IMPORTED = (matplotlib, rich, transformers)

STEPS = 6
RECIPE = """
data: {path: chats.jsonl, eval_fraction: 0.25}
adapter: {r: 4, lora_dropout: 0.1}
train:
  max_steps: 6
  micro_batch_size: 2
  gradient_accumulation_steps: 2
  save_steps: 1
  eval_steps: 3
  precision: float32
evaluate: {answers: 4, max_new_tokens: 8}
"""


def forked(folder: Path, kill_after: float | None = None) -> bool:
    """Run `inlay train` in a child; return whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(inlay(["train", "recipe.yaml", "--output_dir", str(folder)]))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit("a run failed that should not")
    return os.WIFEXITED(status)


def left(folder: Path) -> list[object]:
    """Return what must be equal: the adapter's bytes, the scores, the steps, no partial files."""
    run = Run.open(folder)
    steps = [event["step"] for event in run.events() if event["event"] == "step"]
    partial = [str(path) for path in folder.rglob("*.partial")]
    tensors = (run.adapter / "adapter_model.safetensors").read_bytes()
    return [tensors, run.evaluation, steps, partial, run.is_finished]


def main(folder: Path, kills: int, seed: int) -> None:
    os.chdir(folder)
    Path("recipe.yaml").write_text(RECIPE)
    with open("chats.jsonl", "w") as file:
        for i in range(16):
            said = [
                ("user", f"Where is order {i}?"),
                ("assistant", f"In {('Oslo', 'Lima')[i % 2]}."),
            ]
            row = {"messages": [{"role": role, "content": text} for role, text in said]}
            file.write(json.dumps(row) + "\n")
    forked(Path("warm"))
    began = time.monotonic()
    forked(Path("whole"))
    length = time.monotonic() - began
    expected = left(Path("whole"))
    assert expected[2] == list(range(1, STEPS + 1))
    chosen, equal, killed = random.Random(seed), 0, 0
    while killed < kills:
        shutil.rmtree("cut", ignore_errors=True)
        if forked(Path("cut"), chosen.uniform(0, length)):
            continue  # it was done before the kill came
        killed += 1
        while not forked(Path("cut")):
            pass
        equal += left(Path("cut")) == expected
    print(f"{equal} of {killed}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
