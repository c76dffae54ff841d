"""Small parameters in one tensor: AdamW's steps are those of each alone, and nothing else shows."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import inlay
from inlay.train import flat, loop
from inlay.train.events import Events
from inlay.train.flat import clip, flattened, gradients_of, norm_of
from inlay.train.optim import load_optimizer_tensors, optimizer_tensors
from inlay.train.settings import TrainConfig
from tests.methods.bases import build, llama

SETTINGS = {
    "max_steps": 8,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.05,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "precision": "float32",
}
TARGETS = ["q_proj", "k_proj", "gate_proj", "down_proj"]


def lora(**settings):
    return inlay.LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})


RUNS = {
    "lora": (lora(), {}),
    "never clipped": (lora(), {"max_grad_norm": 0.0}),
    "lora+": (lora(target_modules=[*TARGETS, "embed_tokens"]), {"loraplus_lr_ratio": 8.0}),
    "lorafa": (lora(), {"optimizer": "lorafa"}),
    "riemannian": (lora(), {"optimizer": "riemannian"}),
    "dora": (lora(use_dora=True), {}),
    "head trained whole": (lora(modules_to_save=["lm_head"]), {}),
    "adalora": (
        inlay.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=3, target_modules=TARGETS),
        {},
    ),
    "shared": (inlay.VeraConfig(r=4, target_modules=["q_proj"]), {}),
}


@pytest.fixture
def weights_after(toy, tmp_path, monkeypatch):
    """Return a function: what a run leaves of the adapter, and in how many tensors it trained."""

    def train(folder, config, resume=False, apart=False, model=None, **settings):
        if model is None:
            torch.manual_seed(0)
            model = inlay.get_peft_model(build(llama), config)
        found = []

        @contextmanager
        def spied(optimizer, model):
            with flattened(nn.Module() if apart else optimizer, model) as flats:
                found.extend(flats)
                yield flats

        monkeypatch.setattr(loop, "flattened", spied)
        at = tmp_path / folder
        run = TrainConfig(**{**SETTINGS, **settings})
        loop.fit(model, None, toy.objective, toy.rows(12), [], run, at, Events(at), resume=resume)
        tensors = inlay.get_peft_model_state_dict(model)
        return {key: t.clone() for key, t in tensors.items()}, found

    return train


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_each_parameter_alone(weights_after, name):
    config, settings = RUNS[name]
    together, flats = weights_after("together", config, **settings)
    apart, none = weights_after("apart", config, apart=True, **settings)
    assert flats
    assert all(f.together for f in flats)
    assert not none
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-7)


def test_a_run_goes_on_from_the_checkpoint_of_one_that_was_not_flat(weights_after):
    whole, _ = weights_after("whole", lora(), lr_scheduler="constant")
    for first in (True, False):
        folder = f"cut {first}"
        weights_after(folder, lora(), apart=first, max_steps=3, lr_scheduler="constant")
        model = inlay.get_peft_model(build(llama), lora())
        cut, _ = weights_after(
            folder, None, resume=True, apart=not first, model=model, lr_scheduler="constant"
        )
        torch.testing.assert_close(cut, whole, rtol=0, atol=2e-7)


def test_the_parameters_have_memory_of_their_own_again(weights_after):
    model = inlay.get_peft_model(build(llama), lora())
    _, flats = weights_after("run", None, model=model)
    for parameter in [p for f in flats for p in f.parameters]:
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


class Parts(nn.Module):
    """Parameters of many shapes, whose numbers do not fill rows."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (3, 5), "b": (7, 3), "bias": (4,), "one": (), "wide": (33, 50)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def optimizer(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, fused=True)


def steps(model, optimizer, count, seed=1, without=(), flats=()):
    """Step on random gradients: from the second step on, those in `without` have none."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        for name, parameter in model.named_parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if step and name in without else grad
        gradients = gradients_of(model.parameters(), flats)
        clip(gradients, 1.0, norm_of(gradients))
        optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("without", [(), ("b",), ("a", "bias"), tuple(values(Parts()))[1:]])
def test_a_parameter_without_a_gradient_stays_and_counts_no_step(without):
    def run(model, optimizer, flats):
        steps(model, optimizer, 3, without=without, flats=flats)
        optimizer.zero_grad()
        optimizer.step()  # in which none has one
        steps(model, optimizer, 2, seed=2, flats=flats)

    ours, theirs = Parts(), Parts()
    with flattened(optimizer := ours.optimizer(), ours) as flats:
        run(ours, optimizer, flats)
        found = optimizer_tensors(optimizer, dict(ours.named_parameters()))
        assert [f.together for f in flats] == [not without]
    run(theirs, plain := theirs.optimizer(), ())
    torch.testing.assert_close(values(ours), values(theirs), rtol=0, atol=1e-7)
    wanted = optimizer_tensors(plain, dict(theirs.named_parameters()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    assert {float(found[f"step.{name}"]) for name in without} <= {3.0}


def test_a_step_in_which_nothing_has_a_gradient_changes_nothing():
    model = Parts()
    with flattened(optimizer := model.optimizer(), model) as flats:
        steps(model, optimizer, 1, flats=flats)
        before = values(model)
        optimizer.zero_grad()
        optimizer.step()
        torch.testing.assert_close(values(model), before, rtol=0, atol=0)
        assert flats[0].together


def test_state_loaded_by_name_is_brought_together_unless_it_has_made_other_steps():
    first = Parts()
    with flattened(optimizer := first.optimizer(), first) as flats:
        steps(first, optimizer, 2, flats=flats)
        saved = {
            n: t.clone()
            for n, t in optimizer_tensors(optimizer, dict(first.named_parameters())).items()
        }
        then = values(first)
        steps(first, optimizer, 2, seed=2, flats=flats)
    for other, together in ((2.0, True), (5.0, False)):
        ours, theirs = Parts(), Parts()
        ours.load_state_dict(then)
        theirs.load_state_dict(then)
        state = {**saved, "step.b": torch.tensor(other)}
        with flattened(optimizer := ours.optimizer(), ours) as flats:
            load_optimizer_tensors(optimizer, dict(ours.named_parameters()), state)
            steps(ours, optimizer, 2, seed=2, flats=flats)
            assert flats[0].together is together
        load_optimizer_tensors(plain := theirs.optimizer(), dict(theirs.named_parameters()), state)
        steps(theirs, plain, 2, seed=2)
        torch.testing.assert_close(values(ours), values(theirs), rtol=0, atol=1e-7)
        if together:
            torch.testing.assert_close(values(ours), values(first), rtol=0, atol=0)


def test_a_rate_set_after_loading_is_the_one_that_is_stepped_with():
    model = Parts()
    with flattened(optimizer := model.optimizer(), model) as flats:
        steps(model, optimizer, 1, flats=flats)
        parameters = dict(model.named_parameters())
        load_optimizer_tensors(optimizer, parameters, optimizer_tensors(optimizer, parameters))
        optimizer.param_groups[0]["lr"] = 0.0
        before = values(model)
        steps(model, optimizer, 1, flats=flats)
        assert flats[0].together
        torch.testing.assert_close(values(model), before, rtol=0, atol=0)


def test_a_parameter_given_other_memory_is_still_trained():
    ours, theirs = Parts(), Parts()
    with flattened(optimizer := ours.optimizer(), ours) as flats:
        steps(ours, optimizer, 1, flats=flats)
        ours.a.data = ours.a.data.clone()
        steps(ours, optimizer, 2, seed=2, flats=flats)
        assert not flats[0].together
    steps(theirs, plain := theirs.optimizer(), 1)
    steps(theirs, plain, 2, seed=2)
    torch.testing.assert_close(values(ours), values(theirs), rtol=0, atol=1e-7)


def test_what_is_large_or_half_or_lies_in_anothers_memory_stays_where_it_is():
    model = Parts()
    model.large = nn.Parameter(torch.zeros(flat.LARGEST + 1))
    model.narrow = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    model.tied = nn.Parameter(model.wide.data[:5])
    model.register_buffer("seen", model.bias.data)
    model.across = nn.Parameter(torch.zeros(4, 6).T)
    apart = {"large", "narrow", "tied", "wide", "bias", "across"}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with flattened(model.optimizer(), model) as flats:
        found = {n for n, p in model.named_parameters() for q in flats[0].parameters if p is q}
        assert found == places.keys() - apart
        assert all(getattr(model, name).data_ptr() == places[name] for name in apart)


def test_each_part_begins_where_a_tensor_of_its_own_may():
    model = Parts()
    with flattened(model.optimizer(), model) as flats:
        assert all(p.data_ptr() % 64 == 0 for p in flats[0].parameters)


def test_after_an_error_the_parameters_have_memory_of_their_own_and_their_values():
    model = Parts()
    before = values(model)
    with pytest.raises(KeyError), flattened(model.optimizer(), model):
        raise KeyError
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_the_norm_of_millions_of_numbers_is_that_of_float64():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4096, 1024, generator=generator), torch.randn(5, generator=generator)]
    wanted = torch.cat([g.double().flatten() for g in gradients]).norm()
    torch.testing.assert_close(norm_of(gradients).double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("most", [0.5, 1e9])
def test_clipping_is_torchs(most):
    ours, theirs = Parts(), Parts()
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
    gradients = gradients_of(ours.parameters(), ())
    clip(gradients, most, norm_of(gradients))
    nn.utils.clip_grad_norm_(theirs.parameters(), most)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
