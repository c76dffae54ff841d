"""Every method beside PEFT's of the same name: files both ways, counts, keys, merged weights.

What is tried of a method stands in `settings/`, one file a method: PEFT = case -> (base, settings);
its own `output(model)` where the method's models are called in another way than plain ones. APART
names another file that does the comparison.
PEFT_DOES_NOT_MERGE lists the settings that PEFT itself cannot merge, or merges wrongly, with why;
PEFT_COUNTS_TWICE those where it trains the same numbers under two names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.core.adapter import Wrap
from inlay.methods import method, names
from tests.methods.bases import build, output, randomize, settings_of_methods

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of its own saving and loading
    # PEFT's too, though it heeds the key: it looks for it among the modules alone
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
FILE = "adapter_model.safetensors"
CASES = [
    pytest.param(name, make, settings, id=f"{name} {case}")
    for name, module in settings_of_methods().items()
    for case, (make, settings) in module.PEFT.items()
]
OUTPUTS = {
    name: getattr(module, "output", output) for name, module in settings_of_methods().items()
}
UNMERGED = {
    name: getattr(module, "PEFT_DOES_NOT_MERGE", ())
    for name, module in settings_of_methods().items()
}
TWICE = {
    name: getattr(module, "PEFT_COUNTS_TWICE", ()) for name, module in settings_of_methods().items()
}


def theirs(name: str, make: Any, settings: dict[str, Any]) -> Any:
    """Return PEFT's model with a random adapter, the same one every time."""
    torch.manual_seed(0)
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.upper())]
    model = peft.get_peft_model(build(make), kind(**settings))
    randomize(model)
    return model.eval()


def test_every_method_that_peft_has_is_compared_with_it() -> None:
    shared = {name for name in names() if name.upper() in peft.PeftType.__members__}
    apart = {name for name, module in settings_of_methods().items() if hasattr(module, "APART")}
    assert shared == {case.values[0] for case in CASES} | apart


@pytest.mark.parametrize(("name", "make", "settings"), CASES)
def test_a_file_of_peft_computes_the_same_here_and_goes_back_bit_for_bit(
    name: str, make: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = theirs(name, make, settings)
    expected = OUTPUTS[name](model)
    plain = output(build(make))
    shown = expected[:, -plain.shape[1] :]  # virtual tokens have logits too, before the others'
    assert not torch.allclose(shown, plain, atol=1e-4), "nothing is compared"
    model.save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(build(make), tmp_path / "theirs")
    torch.testing.assert_close(OUTPUTS[name](ours), expected, rtol=0, atol=1e-5)

    ours.save_pretrained(tmp_path / "ours")
    before, after = load_file(tmp_path / "theirs" / FILE), load_file(tmp_path / "ours" / FILE)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    back = peft.PeftModel.from_pretrained(build(make), tmp_path / "ours").eval()
    torch.testing.assert_close(OUTPUTS[name](back), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "make", "settings"), CASES)
def test_a_fresh_adapter_changes_nothing_and_has_pefts_parameters_and_keys(
    name: str, make: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.upper())]
    model = peft.get_peft_model(build(make), kind(**settings))
    config = method(name).config(**settings)
    ours = inlay.get_peft_model(build(make), config).eval()
    neutral = getattr(method(name).of(config), "starts_neutral", True)
    if neutral and not method(name).config.rooted:  # type: ignore[attr-defined]
        # virtual tokens start at random, so that a fresh model is not the base
        torch.testing.assert_close(OUTPUTS[name](ours), output(build(make)), rtol=0, atol=1e-6)
    counts = [side.get_nb_trainable_parameters()[0] for side in (ours, model)]
    assert counts[0] == counts[1] or (settings in TWICE[name] and counts[0] < counts[1])
    shapes = []
    for who, side in {"theirs": model, "ours": ours}.items():
        side.save_pretrained(tmp_path / who)
        shapes.append({k: t.shape for k, t in load_file(tmp_path / who / FILE).items()})
    assert shapes[1] == shapes[0]


@pytest.mark.parametrize(("name", "make", "settings"), CASES)
def test_merged_weights_are_those_of_peft(
    name: str, make: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = theirs(name, make, settings)
    model.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(build(make), tmp_path)
    expected = OUTPUTS[name](ours)
    if issubclass(method(name).of(method(name).config(**settings)) or Wrap, Wrap):
        with pytest.raises(inlay.UserError, match="which no weight can say"):
            ours.merge_and_unload()
        return
    merged = ours.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=0, atol=1e-5)
    if settings in UNMERGED[name]:
        return  # PEFT cannot, or does not compute what it merged; the file says why
    wanted = model.merge_and_unload().state_dict()
    found = merged.state_dict()
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5, msg=key)
