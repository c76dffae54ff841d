"""Layers compiled for a run: the plain layers' numbers, one program for all lengths, put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import inlay
from inlay.core.errors import UserError
from inlay.data.encode import Example
from inlay.data.rows import Source
from inlay.model.attention import PREFIX
from inlay.objectives.sft import Sft
from inlay.train import compiled as module
from inlay.train.compiled import compiled, repeated, require_compilable
from inlay.train.events import Events, read_events
from inlay.train.loop import fit
from inlay.train.settings import TrainConfig
from tests.methods.bases import mixtral, t5

LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the layers as a run does, and leave out what makes machine code, which takes long."""
    monkeypatch.setattr(module, "HOW", {"dynamic": True, "backend": "eager"})


def rows(count: int = 32) -> list[Example]:
    """Rows of 6 to 29 tokens, so that hardly two batches are as long as each other."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        length = int(torch.randint(6, 30, (), generator=generator))
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        made.append(Example(ids, [-100] * 2 + ids[2:], f"{i}", Source("rows.jsonl", i + 1), None))
    return made


@pytest.fixture
def run(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Any) -> Any:
    """Return `run(name, steps=..., layers=2, dropout=0.0, **settings)` -> the losses of its steps.

    `counters` tell afterwards what was compiled.
    """

    def start(name: str, layers: int = 2, dropout: float = 0.0, **settings: Any) -> list[float]:
        torch.manual_seed(0)
        base = tiny_llama(num_hidden_layers=layers)
        model = inlay.get_peft_model(base, inlay.LoraConfig(**LORA, lora_dropout=dropout))
        given = {"max_steps": 6, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
        config = TrainConfig(**{**given, "precision": "float32", "learning_rate": 1e-2, **settings})
        events = Events(tmp_path / name)
        counters.clear()
        objective = Sft(packing=config.fast)
        fit(model, tiny_tokenizer, objective, rows(), [], config, tmp_path / name, events)
        told = read_events(tmp_path / name / "events.jsonl")
        return [event["loss"] for event in told if event["event"] == "step"]

    return start


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fast", [True, False], ids=["packed", "padded"])
def test_neither_another_length_nor_another_layer_is_compiled_again(run: Any, fast: bool) -> None:
    found = []
    for steps, layers in ((1, 2), (6, 4)):
        run(f"{steps}x{layers}", layers, compile=True, fast=fast, max_steps=steps)
        found.append((counters["stats"]["unique_graphs"], counters["frames"]["total"]))
    assert found[0][0] > 0, "nothing was compiled"
    assert found[0] == found[1]
    # the first layer, whose input needs no gradient; the others; what an objective tries, without
    assert fast or found[0] == (3, 3)


@pytest.mark.usefixtures("quick")
def test_the_losses_are_those_of_the_plain_layers(run: Any) -> None:
    settings = {"fast": False, "dropout": 0.1}
    plain = run("plain", **settings)
    assert run("compiled", compile=True, **settings) == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, of itself
@pytest.mark.parametrize("fast", [True, False], ids=["packed", "padded"])
def test_machine_code_says_what_the_plain_layers_say(run: Any, fast: bool) -> None:
    settings = {"fast": fast, "dropout": 0.0 if fast else 0.1}  # whose draws go by the rows' shape
    plain = run("plain", **{**settings, "fast": False})
    assert run("compiled", compile=True, **settings) == pytest.approx(plain, rel=1e-5)
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]


@pytest.mark.usefixtures("quick")
def test_another_adapter_is_computed_as_it_is_and_afterwards_the_layers_are_plain(
    tiny_llama: Any,
) -> None:
    model = inlay.get_peft_model(tiny_llama(), inlay.LoraConfig(**LORA, init_lora_weights=False))
    model.add_adapter("other", inlay.LoraConfig(**LORA, init_lora_weights=False))
    ids = torch.arange(5, 29)[None]
    names, layers = ["default", "other", "default"], model.get_base_model().model.layers

    @torch.no_grad()
    def logits() -> list[torch.Tensor]:
        found = []
        for name in names:
            model.set_adapter(name)
            found.append(model(input_ids=ids).logits)
        with model.disable_adapter():
            return [*found, model(input_ids=ids).logits]

    def hidden() -> list[str]:
        ours = [name for name in ALL_ATTENTION_FUNCTIONS if name.startswith(PREFIX)]
        return [n for n in ours if hasattr(ALL_ATTENTION_FUNCTIONS[n], "_torchdynamo_disable")]

    wanted = logits()
    with compiled(model, by_rows=True):
        assert all(layer._compiled_call_impl is not None for layer in layers)
        assert hidden()
        torch.testing.assert_close(logits(), wanted)
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert not hidden()
    assert not torch.allclose(wanted[0], wanted[1])


def test_the_repeated_layers_are_those_of_the_stacks_alone() -> None:
    model = t5()
    assert repeated(model) == [*model.encoder.block, *model.decoder.block]
    model = mixtral()
    assert repeated(model) == [*model.model.layers]


def test_a_machine_without_a_compiler_is_told_what_to_install(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler 'no-such-compiler'.*CXX.*compile: fal"):
        require_compilable(tiny_llama())


def test_what_cannot_be_compiled_is_refused(toy: Any) -> None:
    with pytest.raises(UserError, match="ToyLM has no list of repeated layers"):
        require_compilable(toy.model())
    with pytest.raises(UserError, match=r"packed layers \(PackedLinear\).*leave quantize out"):
        require_compilable(inlay.load_base(quantize="nf4", device="cpu")[0])
    with pytest.raises(UserError, match="compile and gradient_checkpointing"):
        TrainConfig(compile=True, gradient_checkpointing=True).validate()


def test_a_compiler_that_fails_is_an_error_that_says_what_to_set(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(module, "HOW", {"dynamic": True, "backend": broken})
    with pytest.raises(UserError, match=r"could not compile a layer .*set train.compile: false"):
        run("broken", compile=True)
