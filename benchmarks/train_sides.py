"""One side of `train.py`, in a process of its own: it makes a step whenever it is told to.

The training loops are the real ones, held between two steps: `inlay.train.loop.fit` in a listener
of its events, TRL's `SFTTrainer.train` in a callback. Both read the same rows in the same order,
start from the same base and the same adapter, and use the same optimizer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_shapes import SHAPES, rows, work

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
VIRTUAL = {"num_virtual_tokens": 16}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", LORA),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}),
    "ia3": ("IA3Config", {}),
    "prefix": ("PrefixTuningConfig", VIRTUAL),
    "prompt": ("PromptTuningConfig", VIRTUAL),
    "p_tuning": ("PromptEncoderConfig", {**VIRTUAL, "encoder_hidden_size": 128}),
    "bottleneck": ("BottleneckConfig", {}),
    "full": ("FullConfig", {}),
}
"""name -> the class of its settings, by the same name in PEFT, and the settings."""
STANDS_IN = {"bottleneck": "lora"}
"""What PEFT does in place of a method that it has not; `full` needs no PEFT."""
SEED, RATE = 42, 2e-4
GEMM = (1024, 1536, 1536)


class Pace:
    """Waits for the word to go, and answers what the step took."""

    def __init__(self, dtype: Any, measured: bool) -> None:
        """Answer on what was stdout; whatever libraries print goes to stderr."""
        self.answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.dtype, self.measured = dtype, measured
        self.memory = {"imported_mib": status("VmRSS")}
        self.began = self.gemm = 0.0

    def loaded(self) -> None:
        """Say that the model is there."""
        self.memory["loaded_mib"] = status("VmRSS")
        self.answer(ready=True)

    def wait(self) -> None:
        """Return when the next step may begin."""
        if not sys.stdin.readline():
            sys.exit(0)
        self.gemm = self.ceiling()
        self.began = time.perf_counter()

    def done(self, loss: float, tokens: int) -> None:
        """Answer for the step that has ended."""
        seconds = time.perf_counter() - self.began
        peak = status("VmHWM")  # before the product beside it takes memory of its own
        gemm = (self.gemm + self.ceiling()) / 2
        self.answer(
            seconds=seconds, loss=loss, tokens=tokens, gemm=gemm, peak_mib=peak, **self.memory
        )

    def answer(self, **told: Any) -> None:
        """Write one line."""
        print(json.dumps(told), file=self.answers, flush=True)

    def ceiling(self) -> float:
        """Return the GFLOP/s of a plain product, the best of three, by the faster library."""
        if not self.measured:
            return 0.0
        import torch

        n, i, o = GEMM
        x, w = torch.ones(n, i, dtype=self.dtype), torch.ones(o, i, dtype=self.dtype)
        best = 1e9
        with torch.no_grad():
            for turn in range(3):
                start = time.perf_counter()
                if turn and torch.backends.mkldnn.is_available():
                    torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
                else:
                    torch.mm(x, w.T)
                best = min(best, time.perf_counter() - start)
        return 2e-9 * n * i * o / best


def status(name: str) -> float:
    """Return a figure of this process in MiB, as Linux counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def prepare(job: dict[str, Any]) -> None:
    """Make the base, in bfloat16, and the adapter that both sides start from."""
    import peft
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from inlay.model.load import embedded

    kind, changed = SHAPES[job["shape"]]
    folder = Path(job["base"])
    if not (folder / "config.json").is_file():
        config = AutoConfig.for_model(kind, **changed)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(embedded()).save_pretrained(folder)
    start = Path(job["start"])
    if not start.is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        found = work(model, 0)
        tensors: dict[str, Any] = {}
        tuned = theirs(model, job["method"])
        if tuned is not model:
            tensors = {n: t.contiguous() for n, t in peft.get_peft_model_state_dict(tuned).items()}
            trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
            found["adapter"] = trained
        save_file(tensors, start)
        start.with_suffix(".json").write_text(json.dumps(found))


def theirs(model: Any, method: str) -> Any:
    """Return `model` with PEFT's adapter of this method; as it is where all of it trains."""
    import peft
    import torch

    if method == "full":
        return model
    name, settings = METHODS[STANDS_IN.get(method, method)]
    torch.manual_seed(SEED)
    return peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **settings))


def examples(job: dict[str, Any], vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Return the rows of the whole run."""
    return rows(job["total"] * job["batch"] * job["accumulate"], vocabulary)


def run_inlay(job: dict[str, Any], pace_of: Callable[[], Pace]) -> None:
    """Train with inlay, as `inlay train` does."""
    import torch
    from safetensors.torch import load_file

    import inlay
    from inlay.data.example import Example
    from inlay.data.rows import Source
    from inlay.methods.full import FullConfig
    from inlay.objectives.sft import Sft
    from inlay.train.events import Events
    from inlay.train.loop import fit
    from inlay.train.settings import TrainConfig
    from inlay.train.setup import choose_packing

    pace = pace_of()
    base, tokenizer = inlay.load_base(job["base"], dtype=job["dtype"], device="cpu")
    name, settings = METHODS[job["method"]]
    torch.manual_seed(SEED)
    kind = FullConfig if job["method"] == "full" else getattr(inlay, name)
    model = inlay.get_peft_model(base, kind(task_type="CAUSAL_LM", **settings))
    start = load_file(job["start"])
    # the file of p_tuning has the tokens, and not the encoder that trains
    if start and job["method"] not in ("p_tuning", *STANDS_IN):
        inlay.set_peft_model_state_dict(model, start)
    config = TrainConfig(
        **{
            "max_steps": job["total"],
            "micro_batch_size": job["batch"],
            "gradient_accumulation_steps": job["accumulate"],
            "learning_rate": RATE,
            "lr_scheduler": "constant",
            "warmup_ratio": 0.0,
            "gradient_checkpointing": job["checkpointing"],
            "precision": job["dtype"],
            "save_steps": None,
            "seed": SEED,
            **job["set"],
        }
    )
    asked = Sft(packing=bool(config.packing), fast=config.fast)
    objective, _ = choose_packing(model, asked, config)
    made = examples(job, base.config.vocab_size)
    train = [
        Example(ids, labels, str(i), Source("rows", i)) for i, (ids, labels) in enumerate(made)
    ]

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            pace.done(event["loss"], event["tokens"])
        if event["event"] in ("start", "step") and event["step"] < job["total"]:
            pace.wait()

    pace.loaded()
    with tempfile.TemporaryDirectory() as folder:
        events = Events(folder, [listen])
        fit(model, tokenizer, objective, train, [], config, folder, events)


def run_trl(job: dict[str, Any], pace_of: Callable[[], Pace]) -> None:
    """Train with TRL's SFTTrainer over PEFT, in its padded default or padding-free."""
    import peft
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from inlay.train.order import Order

    pace = pace_of()
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype)
    model = theirs(model, job["method"])
    start = load_file(job["start"])
    if start:
        peft.set_peft_model_state_dict(model, start)
    made = examples(job, model.config.vocab_size)
    size = job["batch"] * job["accumulate"]
    order = Order(len(made), size, SEED)
    made = [made[i] for step in range(job["total"]) for i in order.indices(step)]
    losses: list[Any] = []

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            losses.append(loss)
            return loss

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            losses.clear()
            pace.wait()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            part = made[(state.global_step - 1) * size : state.global_step * size]
            loss = torch.stack(losses).sum().item()
            pace.done(loss, sum(len(ids) for ids, _ in part))

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=job["dtype"] == "bfloat16",
            max_steps=job["total"],
            per_device_train_batch_size=job["batch"],
            gradient_accumulation_steps=job["accumulate"],
            learning_rate=RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=job["checkpointing"],
            gradient_checkpointing_kwargs={"use_reentrant": False}
            if job["checkpointing"]
            else None,
            padding_free=job["side"] == "trl-free",
            max_length=None,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        rows_of = {"input_ids": [ids for ids, _ in made], "labels": [labels for _, labels in made]}
        trainer = Trainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict(rows_of),
            processing_class=AutoTokenizer.from_pretrained(job["base"]),
            callbacks=[Turns()],
        )
        pace.loaded()
        trainer.train()


def main() -> None:
    """Be the side that the first argument, a JSON object, describes."""
    job = json.loads(sys.argv[1])
    if job["side"] == "prepare":
        return prepare(job)

    def pace_of() -> Pace:
        import torch

        return Pace(getattr(torch, job["dtype"]), job["measured"])

    (run_inlay if job["side"] == "inlay" else run_trl)(job, pace_of)


if __name__ == "__main__":
    main()
