"""The file's name is the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import inlay.methods
from inlay.core.errors import UserError
from inlay.methods import method, method_of, names
from inlay.methods.full import FullConfig
from inlay.methods.lora import Lora, LoraConfig
from inlay.model.roster import Roster


def test_every_file_is_a_method_under_its_name():
    assert {"lora", "full"} <= set(names())
    for name in names():
        found = method(name.upper())
        assert found is method(name) or found == method(name)
        assert str(found.config.method) == name.upper()
    assert method_of(LoraConfig()).adapter is Lora
    assert method_of(FullConfig()).adapter is None


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown method 'lorra'.*Did you mean 'lora'\?"):
        method("lorra")


def test_full_fine_tuning_leaves_the_named_modules_trainable_and_hosts_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    roster = Roster(model)
    assert roster.add("full", FullConfig(target_modules=["1"])) == {}
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [False, False, True, True]
    assert roster.hosts == {}
    assert roster.names == ("full",)
    with pytest.raises(UserError, match="whose own weights train"):
        roster.add("a", LoraConfig(target_modules=["0"]))
    assert roster.take_out(merged=False) is model
    assert all(p.requires_grad for p in model.parameters())


def test_full_fine_tuning_without_names_trains_all_there_is():
    model = nn.Sequential(nn.Linear(3, 4))
    Roster(model).add("full", FullConfig())
    assert all(p.requires_grad for p in model.parameters())


def test_full_fine_tuning_needs_a_model_without_adapters():
    roster = Roster(nn.Sequential(nn.Linear(3, 4)))
    roster.add("a", LoraConfig(target_modules=["0"]))
    with pytest.raises(UserError, match="needs a model without adapters; it has a"):
        roster.add("full", FullConfig())


def test_no_method_is_longer_than_a_sitting():
    files = Path(inlay.methods.__file__).parent.glob("*.py")
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: n for name, n in lengths.items() if n > 200} == {}
