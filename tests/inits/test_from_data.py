"""Starts from data beside PEFT's: EVA, CorDA and LoRA-GA; the base stays, the files say all."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay import inits
from inlay.core.errors import UserError
from inlay.inits.eva import Components
from inlay.model.starts import FOUND
from tests.methods.bases import build, gpt2, llama, output, randomize
from tests.model.nets import trace

peft = pytest.importorskip("peft")
from peft.tuners.lora.config import CordaConfig  # noqa: E402

with mock.patch.dict(sys.modules, {"attr": dataclasses}):  # PEFT asks for it without saying so
    from peft.tuners.lora.corda import preprocess_corda

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of its files and of transformers
FILE = "adapter_model.safetensors"
Make = Callable[[], nn.Module]


def batches(count: int = 4, rows: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 60, (rows, 12), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def of(model: Any) -> dict[str, Tensor]:
    library = peft if isinstance(model, peft.PeftModel) else inlay
    return {k: t.clone() for k, t in library.get_peft_model_state_dict(model).items()}


def aligned(found: Tensor, wanted: Tensor, dim: int) -> Tensor:
    """Return `found` with each row or column turned to the side of the other's."""
    return found * (found * wanted).sum(dim, keepdim=True).sign()


# -- EVA


def eva(library: Any, make: Make, config: dict[str, Any], **settings: Any) -> Any:
    model = library.get_peft_model(
        make(),
        library.LoraConfig(
            init_lora_weights="eva", eva_config=library.EvaConfig(**config), **settings
        ),
    )
    library.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    return model


@pytest.mark.parametrize(
    ("make", "targets", "config"),
    [
        (llama, ["q_proj", "down_proj"], {"tau": 0.9}),
        (llama, ["o_proj", "up_proj"], {"tau": 0.9, "rho": 1.0, "whiten": True}),
        (gpt2, ["c_attn", "c_proj"], {"tau": 0.8, "adjust_scaling_factors": False, "rho": 1.5}),
    ],
)
def test_eva_finds_pefts_directions_and_ranks(
    make: Make, targets: list[str], config: dict[str, Any], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets}
    settings["fan_in_fan_out"] = make is gpt2
    theirs, ours = (
        eva(library, lambda: build(make), config, **settings) for library in (peft, inlay)
    )
    wanted, found = of(theirs), of(ours)
    assert found.keys() == wanted.keys()
    for key in wanted:
        if "lora_B" in key:
            assert not found[key].any()
            continue
        side = aligned(found[key], wanted[key], 1)
        torch.testing.assert_close(side, wanted[key], rtol=0.02, atol=0.02, msg=key)
    their_config, config_ = theirs.peft_config["default"], ours.peft_config["default"]
    assert config_.rank_pattern == their_config.rank_pattern
    assert config_.alpha_pattern == pytest.approx(their_config.alpha_pattern)
    expected = output(build(make).eval())
    assert torch.equal(output(ours.eval()), expected)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith("lora_B"):
                p.add_(torch.randn(p.shape))
    changed = output(ours)
    ours.save_pretrained(tmp_path)
    for library in (peft, inlay):
        back = library.PeftModel.from_pretrained(build(make), tmp_path).eval()
        torch.testing.assert_close(output(back), changed, rtol=0, atol=1e-4)


def test_components_in_parts_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(90, 7, dtype=torch.float32) @ torch.randn(7, 7) + 3
    parts = Components(4, 0.5)
    for part in x.split([2, 40, 1, 30, 17]):
        parts.add(part)
    parts.add(x[:0])
    _, s, v = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    # a direction that was left out once is not remembered, so that only the first are exact
    torch.testing.assert_close(parts.values[:2].double(), s[:2], rtol=0.02, atol=0)
    cosines = (parts.vectors.double() * v[:4]).sum(1).abs()
    assert (cosines[:2] > 0.99).all()
    exact = Components(7, 0.5)
    for part in x.split([20, 40, 30]):
        exact.add(part)
    torch.testing.assert_close(exact.values.double(), s, rtol=1e-4, atol=1e-4)
    assert float(exact.shares.sum()) == pytest.approx(1, rel=1e-5)


def test_a_layer_that_explains_least_gets_no_adapter() -> None:
    model = inlay.get_peft_model(
        build(llama),
        inlay.LoraConfig(
            r=1, init_lora_weights="eva", eva_config={"rho": 8}, target_modules="all-linear"
        ),
    )
    before = len(model.roster.hosts)
    inlay.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    ranks = [len(a.lora_A) for _, _, a in model.roster.adapters("default")]
    assert sum(ranks) == before
    assert len(ranks) < before
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    inlay.get_peft_model(build(llama), model.peft_config["default"].replace(inference_mode=False))


def test_few_positions_wait_for_more() -> None:
    # 3 positions a batch, 8 directions: PEFT waits for ever
    short = [{"input_ids": b["input_ids"][:1, :3]} for b in batches(6)]
    model = inlay.get_peft_model(
        build(llama), inlay.LoraConfig(r=4, init_lora_weights="eva", target_modules=["q_proj"])
    )
    inlay.initialize_lora_eva_weights(model, short, show_progress_bar=False)
    assert all(a.lora_A.isfinite().all() for _, _, a in model.roster.adapters("default"))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({}, "needs a dataloader"),
        ({"dataloader": []}, "there are no batches"),
        ({"dataloader": [torch.ones(2, 3).long()]}, "mappings with input_ids"),
        ({"eva_state_dict": {"lm_head": torch.ones(1, 2)}}, "'lm_head', which"),
    ],
)
def test_eva_says_what_it_lacks(how: dict[str, Any], reason: str) -> None:
    model = inlay.get_peft_model(
        build(llama), inlay.LoraConfig(r=2, init_lora_weights="eva", target_modules=["q_proj"])
    )
    if how.get("dataloader"):
        how = {**how, "forward_fn": lambda m, x: m(x)}
    with pytest.raises(UserError, match=reason):
        inlay.initialize_lora_eva_weights(model, **how)


# -- CorDA


def run(model: nn.Module) -> Callable[[], None]:
    def through() -> None:
        with torch.no_grad():
            for batch in batches(3, rows=1):
                model(input_ids=batch["input_ids"])

    return through


def corda(make: Make, method: str = "ipm", **more: Any) -> Any:
    base = build(make)
    config = inlay.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="corda",
        corda_config=inlay.CordaConfig(corda_method=method, **more),
        target_modules=["q_proj", "down_proj"] if make is llama else ["c_attn", "c_proj"],
        fan_in_fan_out=make is gpt2,
    )
    inlay.preprocess_corda(base, config, run(base))
    return inlay.get_peft_model(base, config)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_corda_begins_with_pefts_factors(make: Make, method: str) -> None:
    ours = corda(make, method)
    base = build(make)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
        target_modules=["q_proj", "down_proj"] if make is llama else ["c_attn", "c_proj"],
        fan_in_fan_out=make is gpt2,
    )
    preprocess_corda(base, config, run(base))
    theirs = peft.get_peft_model(base, config)
    wanted, found = of(theirs), of(ours)
    assert found.keys() == wanted.keys()
    for key in wanted:
        side = aligned(found[key], wanted[key], 1 if "lora_A" in key else 0)
        torch.testing.assert_close(side, wanted[key], rtol=1e-2, atol=2e-3, msg=key)


def gradient_run(model: nn.Module) -> Callable[[], None]:
    def steps() -> None:
        for batch in batches(3):
            model(**batch).loss.backward()

    return steps


def lora_ga(make: Make, **settings: Any) -> Any:
    base = build(make)
    config = inlay.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="lora_ga",
        lora_ga_config=inlay.LoraGAConfig(**settings),
        target_modules=["q_proj", "down_proj"] if make is llama else ["c_attn", "c_proj"],
        fan_in_fan_out=make is gpt2,
    )
    inlay.preprocess_loraga(base, config, gradient_run(base))
    return inlay.get_peft_model(base, config)


STARTED: dict[str, Callable[[Make], Any]] = {"corda": corda, "lora_ga": lora_ga}


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga_takes_pefts_directions(direction: str) -> None:
    ours = lora_ga(llama, direction=direction)
    base = build(llama)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction),
        target_modules=["q_proj", "down_proj"],
    )
    peft.preprocess_loraga(base, config, gradient_run(base))
    theirs = peft.get_peft_model(base, config)
    wanted, found = of(theirs), of(ours)
    # PEFT multiplies B by the gradient's singular values and leaves A at length 1, where the paper
    # gives both the same length: so the directions alone are compared
    for key in wanted:
        dim = 1 if "lora_A" in key else 0
        own, other = (nn.functional.normalize(t, dim=dim) for t in (found[key], wanted[key]))
        torch.testing.assert_close(aligned(own, other, dim), other, rtol=1e-2, atol=1e-2, msg=key)


def test_lora_gas_first_step_is_full_fine_tunings_on_what_it_can_reach() -> None:
    torch.manual_seed(0)
    weight, gradient, scale = torch.randn(40, 30), torch.randn(40, 30), 0.5
    b, a, from_the_base = inits.start(
        "lora_ga", weight, 15, scale, gradient=gradient, length="unit"
    )
    assert from_the_base
    # dW ~ B B^T G + G A^T A: with all 2 R = I directions shared out, G itself
    torch.testing.assert_close(
        b @ b.T @ gradient + gradient @ a.T @ a, gradient, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("length", "expected"),
    [("unit", 1.0), ("gd_scale", 2.0), ("stable", 40**0.25 / 3)],
)
def test_the_factors_are_as_long_as_asked(length: str, expected: float) -> None:
    weight, gradient = torch.randn(40, 30), torch.randn(40, 30)
    more: dict[str, Any] = {"gradient": gradient, "length": length, "gamma": 9}
    b, a, _ = inits.start("lora_ga", weight, 4, 0.5, direction="random", **more)
    torch.testing.assert_close(b.norm(dim=0), torch.full((4,), expected))
    torch.testing.assert_close(a.norm(dim=1), torch.full((4,), expected))


# -- both take their start off the base


@pytest.mark.parametrize("init", STARTED)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_model_begins_as_it_was_and_the_base_stays(init: str, make: Make) -> None:
    before, expected = build(make).state_dict(), output(build(make).eval())
    model = STARTED[init](make).eval()
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-4)
    randomize(model)
    changed = output(model)
    assert not torch.allclose(changed, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(output(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(output(model), changed, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    after = model.unload().state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("init", STARTED)
def test_it_is_saved_as_a_plain_lora_for_any_reader(init: str, tmp_path: Path) -> None:
    model = STARTED[init](llama)
    randomize(model)
    expected = output(model.eval())
    for form in (True, False):
        model.save_pretrained(tmp_path / str(form), as_plain_lora=form)
        for library in (peft, inlay):
            back = library.PeftModel.from_pretrained(build(llama), tmp_path / str(form)).eval()
            torch.testing.assert_close(output(back), expected, rtol=0, atol=1e-4)
            assert back.peft_config["default"].r == 8


def test_pefts_own_file_is_read_where_the_start_was_found_again(tmp_path: Path) -> None:
    base = build(llama)
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "corda"}
    config = peft.LoraConfig(corda_config=CordaConfig(), **settings)
    preprocess_corda(base, config, run(base))
    theirs = peft.get_peft_model(base, config)
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path)
    fresh = build(llama)
    with pytest.raises(UserError, match="or data, left of the base"):
        inlay.PeftModel.from_pretrained(fresh, tmp_path)
    inlay.preprocess_corda(fresh, inlay.LoraConfig(**settings), run(fresh))
    ours = inlay.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(output(ours), output(theirs), rtol=0, atol=1e-3)


def test_what_was_found_is_kept_in_files(tmp_path: Path) -> None:
    cache, covariances = str(tmp_path / "c" / "cache"), str(tmp_path / "c" / "cov")
    first = corda(llama, cache_file=cache, covariance_file=covariances)
    assert load_file(covariances)
    base = build(llama)
    config = first.peft_config["default"].replace(inference_mode=False)
    inlay.preprocess_corda(base, config)
    again = inlay.get_peft_model(base, config)
    found, wanted = of(again), of(first)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    copied = copy.deepcopy(base)
    assert any(FOUND in module.__dict__ for module in copied.modules())


@pytest.mark.parametrize("init", STARTED)
def test_it_needs_its_data_first_and_the_same_settings(init: str) -> None:
    config = inlay.LoraConfig(r=2, init_lora_weights=init, target_modules=["q_proj"])
    base = build(llama)
    before = trace(base)
    with pytest.raises(UserError, match=r"starts from data: call preprocess_"):
        inlay.get_peft_model(base, config)
    assert trace(base) == before
    if init == "corda":
        inlay.preprocess_corda(base, config, run(base))
    else:
        inlay.preprocess_loraga(base, config, gradient_run(base))
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    with pytest.raises(UserError, match="was called for rank 2 at scale 4"):
        inlay.get_peft_model(base, config.replace(r=3))
    inlay.get_peft_model(base, config)


def test_data_that_says_nothing_is_refused() -> None:
    base = build(llama)
    config = inlay.LoraConfig(r=2, init_lora_weights="corda", target_modules=["q_proj"])
    with pytest.raises(UserError, match="was not called"):
        inlay.preprocess_corda(base, config, lambda: None)
    with pytest.raises(UserError, match="needs run_model"):
        inlay.preprocess_corda(base, config)
    config = config.replace(init_lora_weights="lora_ga", corda_config=None)
    with pytest.raises(UserError, match="got no gradient"):
        inlay.preprocess_loraga(base, config, lambda: None)
    with pytest.raises(UserError, match="with init_lora_weights='lora_ga'"):
        inlay.preprocess_loraga(base, inlay.LoraConfig(), lambda: None)
    with pytest.raises(UserError, match=r"shares out 2 \* 20 directions"):
        inits.start("lora_ga", torch.ones(30, 30), 20, 1.0, gradient=torch.ones(30, 30))
