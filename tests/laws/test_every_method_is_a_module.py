"""Every method in a model: copies, dtypes, state dicts, files and training leave it itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.methods import method
from tests.laws.samples import HOSTED
from tests.methods.bases import bert, build, llama, randomize, settings_of_methods
from tests.methods.bases import output as plain_output


def tried(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a base and settings: the first of those compared with PEFT, or of the laws."""
    settings = settings_of_methods().get(name)
    if settings is not None and settings.PEFT:
        return next(iter(settings.PEFT.values()))
    own = bert if name == "bitfit" else llama  # llama has no bias
    return own, (settings.LAWS[0] if settings else {})


def output(model: Any, name: str) -> torch.Tensor:
    """Return the logits of two rows, called as the method's settings say."""
    own = getattr(settings_of_methods().get(name), "output", None)
    return (own or plain_output)(model)


CASES = [pytest.param(name, *tried(name), id=name) for name in HOSTED]
cases = pytest.mark.parametrize(("name", "make", "setting"), CASES)


def adapted(name: str, make: Any, setting: dict[str, Any], *, moved: bool = True) -> Any:
    torch.manual_seed(0)
    model = inlay.get_peft_model(build(make), method(name).config(**setting))
    if moved:
        randomize(model)
    return model.eval()


@cases
def test_a_copy_computes_the_same_and_is_apart_from_the_first(
    name: str, make: Any, setting: Any
) -> None:
    model = adapted(name, make, setting)
    expected = output(model, name)
    other = copy.deepcopy(model)
    torch.testing.assert_close(output(other, name), expected, rtol=0, atol=0)
    randomize(other, 0.5)
    assert not torch.equal(output(other, name), expected)
    torch.testing.assert_close(output(model, name), expected, rtol=0, atol=0)


@cases
def test_a_state_dict_and_a_file_bring_it_back(
    name: str, make: Any, setting: Any, tmp_path: Path
) -> None:
    model = adapted(name, make, setting)
    expected = output(model, name)
    fresh = adapted(name, make, setting, moved=False)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(fresh, name), expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = inlay.PeftModel.from_pretrained(build(make), tmp_path)
    torch.testing.assert_close(output(loaded, name), expected, rtol=0, atol=1e-6)


@cases
def test_it_moves_to_other_dtypes_with_the_model(name: str, make: Any, setting: Any) -> None:
    model = adapted(name, make, setting)
    expected = output(model, name)
    torch.testing.assert_close(output(model.double(), name).float(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output(model.float(), name), expected, rtol=1e-3, atol=1e-4)
    half = output(model.bfloat16(), name)
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@cases
def test_it_trains_alone_and_is_unloaded_without_a_trace(
    name: str, make: Any, setting: Any
) -> None:
    if name == "adalora":
        setting = setting | {"total_step": 100}
    model = adapted(name, make, setting, moved=False).double().train()
    base = {n: p.clone() for n, p in build(make).double().state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.Adam(trained, lr=0.01)
    before = output(model, name)
    ids = torch.arange(3, 23).reshape(2, 10)
    labels = torch.tensor([0, 1]) if make is bert else ids
    call = {"task_ids": torch.tensor([2, 0])} if "n_tasks" in setting else {}
    for _ in range(3):
        model(input_ids=ids, labels=labels, **call).loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    moved = output(model, name) - before
    assert moved.isfinite().all()
    assert moved.abs().max() > 1e-9, "three steps changed nothing"
    plain = model.unload()
    after = plain.state_dict()
    assert after.keys() == base.keys()
    assert all(torch.equal(after[key], base[key]) for key in base)
    assert all(p.requires_grad for p in plain.parameters())
