"""Paged optimizers: the bits, the state and the checkpoints of those that are not paged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.checkpoint.train import write_checkpoint
from inlay.core.errors import UserError
from inlay.train import paged, pages
from inlay.train.adam8bit import LEAST
from inlay.train.events import Events
from inlay.train.loop import fit
from inlay.train.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from inlay.train.paged import PagedAdamW
from inlay.train.settings import TrainConfig

SHAPES = {
    "matrix": (90, 70),
    "small": (5, 3),
    "vector": (5003,),
    "large": (300, 101),
    "late": (64, 64),
}
BOTH = pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}


def config(name):
    return TrainConfig(optimizer=name, learning_rate=0.01, weight_decay=0.1)


def steps(made, optimizer, numbers):
    for i in numbers:
        generator = torch.Generator().manual_seed(i)
        for name, parameter in made.items():
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            # one has no gradient at first, and another none in between
            idle = (name == "late" and i < 2) or (name == "matrix" and i == 3)
            parameter.grad = None if idle else drawn
        optimizer.step()


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    # that begin and end within parameters
    monkeypatch.setattr(paged.PagedAdamW.__init__, "__kwdefaults__", _defaults(page=4096))


def _defaults(**changed):
    return {**paged.PagedAdamW.__init__.__kwdefaults__, **changed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BOTH
def test_steps_and_state_are_those_of_the_unpaged_to_the_bit(name, dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = make_optimizer(ours, config(f"paged_{name}"))
    plain = make_optimizer(theirs, config(name))
    assert isinstance(optimizer, PagedAdamW)
    steps(ours, optimizer, range(6))
    steps(theirs, plain, range(6))
    (book,) = optimizer.books
    assert len(book.spans) > 2
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)
    kept, expected = optimizer_tensors(optimizer, ours), optimizer_tensors(plain, theirs)
    assert kept.keys() == expected.keys()
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", [("paged_", ""), ("", "paged_"), ("paged_", "paged_")])
@BOTH
def test_a_checkpoint_of_one_goes_on_in_the_other_with_the_same_bits(name, way, tmp_path):
    first, then = way
    whole, cut = parameters(), parameters()
    plain = make_optimizer(whole, config(name))
    steps(whole, plain, range(7))
    begun = make_optimizer(cut, config(first + name))
    steps(cut, begun, range(4))
    saved = write_checkpoint(tmp_path, 4, optimizer_tensors(begun, cut), {}).tensors()
    resumed = make_optimizer(cut, config(then + name))
    load_optimizer_tensors(resumed, cut, saved)
    steps(cut, resumed, range(4, 7))
    torch.testing.assert_close(dict(cut), dict(whole), rtol=0, atol=0)


@BOTH
def test_on_the_device_are_two_pages_and_what_is_small(name):
    made = parameters()
    optimizer = make_optimizer(made, config(f"paged_{name}"))
    steps(made, optimizer, range(3))
    (book,) = optimizer.books
    assert len(book.slots) == 2
    assert all(len(t) * book.layout[n][1] <= 4096 for s in book.slots for n, t in s.items())
    paged_ones = {n for n, p in made.items() if p in book.places}
    assert paged_ones == {n for n, p in made.items() if p.numel() >= LEAST}
    for parameter, places in book.places.items():
        for kind, tensor in places.items():
            assert optimizer.state[parameter][kind].data_ptr() == tensor.data_ptr()


def test_a_page_is_written_back_before_its_slot_is_filled_anew(monkeypatch):
    told = []
    copy = pages.Lane.copy

    def noted(self, into, out_of):
        names = {id(slot): i for i, slot in enumerate(book.slots)}
        told.append(f"in {names[id(into)]}" if id(into) in names else f"out {names[id(out_of)]}")
        return copy(self, into, out_of)

    made = {"weight": nn.Parameter(torch.zeros(4, 4096))}
    optimizer = make_optimizer(made, config("paged_adamw"))
    steps(made, optimizer, [5])
    (book,) = optimizer.books
    monkeypatch.setattr(pages.Lane, "copy", noted)
    steps(made, optimizer, [6])
    # the next page comes while one is computed
    assert told == ["in 0", "in 1", "out 0", "in 0", "out 1", "in 1", "out 0", "out 1"]


def test_parameters_that_are_added_later_get_pages_of_their_own():
    made, plain = parameters(), parameters()
    optimizers = []
    for held, name in ((made, "paged_adamw"), (plain, "adamw")):
        some = {n: p for n, p in held.items() if n != "large"}
        optimizers.append(make_optimizer(some, config(name)))
        steps(some, optimizers[-1], range(2, 4))
        optimizers[-1].add_param_group({"params": [held["large"]], "weight_decay": 0.0})
        steps(held, optimizers[-1], range(4, 6))
    torch.testing.assert_close(dict(made), dict(plain), rtol=0, atol=0)
    assert len(optimizers[0].books) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@BOTH
def test_on_a_gpu_the_bits_are_those_of_the_unpaged_and_two_pages_are_all_it_holds(name):
    def made():
        return {n: nn.Parameter(p.detach().cuda()) for n, p in parameters().items()}

    def gradients(i):
        generator = torch.Generator("cuda").manual_seed(i)
        return {n: torch.randn(s, generator=generator, device="cuda") for n, s in SHAPES.items()}

    ours, theirs = made(), made()
    optimizers = [make_optimizer(h, config(p + name)) for h, p in ((ours, "paged_"), (theirs, ""))]
    for i in range(20):
        drawn = gradients(i)
        for held, optimizer in zip((ours, theirs), optimizers, strict=True):
            for n, parameter in held.items():
                parameter.grad = drawn[n]
            optimizer.step()
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)
    kept, expected = map(optimizer_tensors, optimizers, (ours, theirs))
    for key, tensor in expected.items():
        assert torch.equal(kept[key].cpu(), tensor.cpu())
    (book,) = optimizers[0].books
    assert all(tensor.is_pinned() for tensor in book.host.values())
    on_device = sum(tensor.nbytes for slot in book.slots for tensor in slot.values())
    assert on_device <= 2 * 4096 * 8


def test_another_device_is_refused():
    weight = nn.Parameter(torch.empty(128, 128, device="meta"))
    weight.grad = torch.empty_like(weight)
    with pytest.raises(UserError, match=r"not to meta; set train\.optimizer to adamw"):
        make_optimizer({"weight": weight}, config("paged_adamw")).step()


@BOTH
def test_a_run_goes_on_under_the_other(name, toy, tmp_path, monkeypatch):
    for module in ("adam8bit", "paged"):  # the toy's matrices have 32 values
        monkeypatch.setattr(f"inlay.train.{module}.LEAST", 16)
    model = {which: toy.model() for which in ("whole", "cut", "resumed")}

    def go(which, optimizer, folder, steps, resume=False):
        settings = {"lr_scheduler": "constant", "micro_batch_size": 2, "warmup_steps": 2}
        told = TrainConfig(optimizer=optimizer, max_steps=steps, **settings)
        at, rows = tmp_path / folder, toy.rows(10)
        events = Events(at)
        fit(model[which], None, toy.objective, rows, [], told, at, events, resume=resume)

    go("whole", name, "whole", 6)
    go("cut", f"paged_{name}", "cut", 3)
    go("resumed", name, "cut", 6, resume=True)
    ours, theirs = model["resumed"].state_dict(), model["whole"].state_dict()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(ours["a.weight"], toy.model().a.weight)
