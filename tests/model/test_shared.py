"""What all sites of an adapter hold in common: there once, saved once, moved and copied with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay import VeraConfig
from tests.methods.bases import build, llama, output, randomize

FILE = "adapter_model.safetensors"
SETTINGS = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def adapted(**changes: object) -> inlay.PeftModel:
    model = inlay.get_peft_model(build(llama), VeraConfig(**{**SETTINGS, **changes})).eval()
    randomize(model)
    return model


def test_it_stands_in_the_model_once_and_does_not_train() -> None:
    model = adapted()
    held = [name for name in model.state_dict() if name.endswith(("vera_A", "vera_B"))]
    assert len(held) == 2
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all("vera_lambda" in name for name in trained)
    numbers = 2 * (32 + 4 + 32 + 4)
    assert model.get_nb_trainable_parameters()[0] == numbers


def test_a_copied_model_has_its_own_and_computes_the_same() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), output(model))
    places = {p.data_ptr() for p in (*model.buffers(), *model.parameters())}
    assert places.isdisjoint(p.data_ptr() for p in (*twin.buffers(), *twin.parameters()))
    twin.double()
    assert {b.dtype for n, b in twin.named_buffers() if "vera" in n} == {torch.float64}
    torch.testing.assert_close(output(twin).float(), output(model))


def test_two_adapters_keep_their_own_and_removing_one_leaves_the_other() -> None:
    model = adapted()
    alone = output(model)
    model.add_adapter("other", VeraConfig(**SETTINGS, projection_prng_key=7))
    model.delete_adapter("other")
    assert torch.equal(output(model), alone)
    model.add_adapter("other", VeraConfig(**SETTINGS, projection_prng_key=7))
    model.delete_adapter("default")
    assert len([n for n in model.state_dict() if n.endswith("vera_A")]) == 1


def test_a_file_has_it_once_and_is_refused_without(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert {k for k in tensors if "lambda" not in k} == {"base_model.vera_A", "base_model.vera_B"}
    (tmp_path / "inlay.json").unlink()
    save_file({k: t for k, t in tensors.items() if k != "base_model.vera_B"}, tmp_path / FILE)
    with pytest.raises(inlay.UserError, match=r"1 missing: base_model\.vera_B"):
        inlay.PeftModel.from_pretrained(build(llama), tmp_path)


def test_what_a_file_does_not_hold_is_drawn_again(tmp_path: Path) -> None:
    model = adapted(save_projection=False, projection_prng_key=3)
    assert not [n for n in model.state_dict() if n.endswith(("vera_A", "vera_B"))]
    model.save_pretrained(tmp_path)
    assert all("lambda" in key for key in load_file(tmp_path / FILE))
    back = inlay.PeftModel.from_pretrained(build(llama), tmp_path)
    assert torch.equal(output(back), output(model))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("method", ["Vera", "RandLora"])
def test_the_draws_are_pefts_to_the_bit(method: str) -> None:
    peft = pytest.importorskip("peft")
    settings = {**SETTINGS, "projection_prng_key": 9}
    theirs = peft.get_peft_model(build(llama), getattr(peft, f"{method}Config")(**settings))
    ours = inlay.get_peft_model(build(llama), getattr(inlay, f"{method}Config")(**settings))
    for name in (f"{method.lower()}_A", f"{method.lower()}_B"):
        drawn = getattr(theirs.base_model, name)["default"]
        (found,) = [b for n, b in ours.named_buffers() if n.endswith(name)]
        assert torch.equal(found, drawn.float())
