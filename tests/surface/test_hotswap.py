"""Hot swap: another LoRA in the place of one, with nothing compiled again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay import LoraConfig, get_peft_model
from tests.methods.bases import build, llama, output, randomize

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def adapted(seed: int = 0, **settings: Any) -> inlay.PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(build(llama), LoraConfig(**{"target_modules": TARGETS, **settings}))
    randomize(model, 0.1 + seed / 10)
    return model.eval()


def saved(folder: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    model = adapted(**settings)
    model.save_pretrained(folder)
    return folder, output(model)


OTHERS = {
    "a lower rank": {"seed": 1, "r": 2, "lora_alpha": 7},
    "a higher rank": {"seed": 2, "r": 9, "use_rslora": True},
    "ranks by layer": {
        "seed": 3,
        "r": 4,
        "rank_pattern": {"q_proj": 11},
        "alpha_pattern": {"q_proj": 3},
    },
    "fewer layers": {"seed": 4, "target_modules": ["q_proj"]},
}


def test_a_compiled_model_takes_other_adapters_without_compiling_again(tmp_path: Path) -> None:
    others = [saved(tmp_path / name.replace(" ", "-"), **s) for name, s in OTHERS.items()]
    model = adapted(r=4)
    before = output(model)
    inlay.prepare_model_for_compiled_hotswap(model, target_rank=11)
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-6)
    kept = {name: id(p) for name, p in model.named_parameters()}
    compiled = torch.compile(model, backend="eager")
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        compiled(input_ids=ids)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for folder, expected in [*others, others[0]]:
                inlay.hotswap_adapter(compiled, folder)
                torch.testing.assert_close(
                    compiled(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5
                )
    assert {name: id(p) for name, p in model.named_parameters()} == kept


def test_what_was_swapped_in_saves_as_what_it_computes(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path / "other", **OTHERS["ranks by layer"])
    model = adapted(r=4)
    inlay.prepare_model_for_compiled_hotswap(model, target_rank=12)
    inlay.hotswap_adapter(model, folder, "default")
    model.save_pretrained(tmp_path / "again")
    again = inlay.PeftModel.from_pretrained(build(llama), tmp_path / "again")
    torch.testing.assert_close(output(again), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"r": 9}, r"has rank 9 at .*room for 4: call prepare_model_for_compiled_hotswap"),
        ({"r": 4, "target_modules": ["q_proj", "k_proj"]}, r"has no adapter: .*k_proj"),
        ({"r": 4, "use_dora": True}, "is no plain LoRA"),
        ({"r": 4, "bias": "all"}, "has bias"),
        ({"r": 4, "modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"r": 4, "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    other: Any, says: str, tmp_path: Path
) -> None:
    kept = {"target_modules": ["q_proj", "down_proj"]}
    folder, _ = saved(tmp_path / "other", **(kept | other))
    model = adapted(r=4, **kept)
    before = output(model)
    with pytest.raises(inlay.UserError, match=says):
        inlay.hotswap_adapter(model, folder)
    torch.testing.assert_close(output(model), before, rtol=0, atol=0)


def test_a_rank_below_an_adapters_is_refused() -> None:
    model = adapted(r=4)
    with pytest.raises(inlay.UserError, match="target_rank=2 is below the rank 4"):
        inlay.prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(inlay.UserError, match="no adapter is called 'x'"):
        inlay.hotswap_adapter(model, "nowhere", "x")
