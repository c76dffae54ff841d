"""Lily: what layers share, and rows that do not depend on each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inlay import LilyConfig, UserError, get_peft_model
from tests.methods.bases import build, llama, output, randomize
from tests.methods.settings.lily import output as row_by_row


def adapted(**settings: Any) -> Any:
    model = get_peft_model(build(lambda: llama(num_hidden_layers=4)), LilyConfig(r=2, **settings))
    randomize(model.eval(), 0.5)
    return model


def matrices(model: Any, name: str) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of the layers called `name`, by the number of their block."""
    found = {path: host.adapters["default"] for path, host in model.roster.hosts.items()}
    return {int(p.split(".")[2]): a._matrices() for p, a in found.items() if p.endswith(name)}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], None, "all-linear"])
def test_neighbors_of_a_name_share_a_and_all_of_it_share_b(targets: Any) -> None:
    model = adapted(stride_A=2, target_modules=targets)
    q, v = matrices(model, "q_proj"), matrices(model, "v_proj")
    assert q[0][0] is q[1][0]
    assert q[1][0] is not q[2][0]
    assert q[2][0] is q[3][0]
    assert len({id(b) for _, b in q.values()}) == 1
    assert q[0][1] is not v[0][1]


def test_a_row_computes_in_any_batch_what_it_does_alone() -> None:
    model = adapted(scaling=2.0)
    torch.testing.assert_close(output(model), row_by_row(model))


def test_the_mix_is_the_mean_over_the_tokens_of_a_row() -> None:
    model = adapted(num_B=3, scaling=0.5)
    host = model.roster.hosts["model.layers.1.self_attn.q_proj"]
    a, b = matrices(model, "q_proj")[1]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        for row, out in zip(x, host(x), strict=True):
            h = row @ a.T
            mix = (h @ host.adapters["default"].router.T).softmax(-1).mean(0)
            experts = sum(p * part for p, part in zip(mix, b.split(2), strict=True))
            meant = host.base_layer(row) + 0.5 * h @ experts
            torch.testing.assert_close(out, meant)


def test_its_file_holds_shared_matrices_once_for_each_layer_as_pefts_does(tmp_path: Any) -> None:
    model = adapted(stride_A=4, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    a = [t for key, t in held.items() if key.endswith("lily_A.weight")]
    assert len(a) == 4
    assert all(torch.equal(t, a[0]) for t in a)
    assert model.get_nb_trainable_parameters()[0] == 2 * 32 + 2 * 2 * 32 + 4 * 2 * 2


def test_one_expert_alone_is_refused() -> None:
    with pytest.raises(UserError, match="num_B=1 must be a whole number from 2"):
        LilyConfig(num_B=1)
