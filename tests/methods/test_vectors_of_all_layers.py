"""Uni-LoRA, TinyLoRA, VB-LoRA, AdaMSS, FRoD: what all layers share, and what files leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import inlay
from inlay import FrodConfig, TinyLoraConfig, UniLoraConfig, UserError, VBLoRAConfig
from inlay.methods._kmeans import grouped
from tests.methods.bases import build, llama, output, randomize

FILE = "adapter_model.safetensors"
SMALL: dict[str, Any] = {"num_vectors": 16, "vector_length": 8}
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


def adapted(config: Any) -> Any:
    model = inlay.get_peft_model(build(llama), config).eval()
    randomize(model)
    return model


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / FILE, {"format": "pt"})
    (folder / "inlay.json").unlink()  # it holds the digest of the file as it was


def test_all_numbers_of_unilora_are_used_alike_and_its_map_keeps_lengths() -> None:
    model = adapted(UniLoraConfig(theta_d_length=50, **TARGETS))
    buffers = dict(model.named_buffers())
    places = torch.cat([b.flatten() for name, b in buffers.items() if "_indices_" in name])
    factors = torch.cat([b.flatten() for name, b in buffers.items() if "_scales_" in name])
    counts = places.bincount(minlength=50)
    assert counts.max() - counts.min() <= 1
    lengths = torch.zeros(50).index_add(0, places, factors.square())  # the columns of P
    torch.testing.assert_close(lengths, torch.ones(50))


def test_a_vector_of_all_layers_gets_the_gradient_of_each() -> None:
    model = adapted(UniLoraConfig(theta_d_length=7, **TARGETS))
    (theta,) = (p for p in model.parameters() if p.requires_grad)
    ids = torch.arange(3, 13)[None]
    model(input_ids=ids).logits.square().sum().backward()
    step, start = 1e-2 * torch.eye(7)[3], theta.detach().clone()
    sides = []
    for sign in (1, -1):
        theta.data = start + sign * step
        sides.append(model(input_ids=ids).logits.double().square().sum().item())
    assert theta.grad is not None
    assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(theta.grad[3].item(), rel=1e-2)


@pytest.mark.parametrize(("tying", "vectors"), [(0.0, 6), (0.5, 3), (0.7, 2), (1.0, 1)])
def test_tinylora_ties_layers_that_follow_each_other(tying: float, vectors: int) -> None:
    model = adapted(TinyLoraConfig(u=5, weight_tying=tying, **TARGETS))
    assert model.get_nb_trainable_parameters()[0] == 5 * vectors


def test_a_file_of_the_top_vectors_alone_computes_the_same_and_does_not_train(
    tmp_path: Path,
) -> None:
    model = adapted(VBLoRAConfig(**SMALL, save_only_topk_weights=True, **TARGETS))
    model.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(build(llama), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="save_only_topk_weights cannot be trained further"):
        again.train()(input_ids=torch.arange(3, 13)[None])


def test_the_last_weight_of_the_top_vectors_is_never_below_zero(tmp_path: Path) -> None:
    adapted(VBLoRAConfig(**SMALL, save_only_topk_weights=True, **TARGETS)).save_pretrained(tmp_path)

    def overflow(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith("_topk_weights"):
                tensors[key].fill_(1 + 1e-7)  # what softmax can be, rounded

    changed(tmp_path, overflow)
    again = inlay.PeftModel.from_pretrained(build(llama), tmp_path)
    assert output(again).isfinite().all()


def outside(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        (first, *_) = (name for name in sorted(tensors) if key in name)
        tensors[first].view(-1)[0] = 250

    return change


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (UniLoraConfig(theta_d_length=99, save_indices=True, **TARGETS), "unilora_indices_B"),
        (VBLoRAConfig(**SMALL, save_only_topk_weights=True, **TARGETS), "_topk_indices"),
        (FrodConfig(**TARGETS), "frod_s_indices"),
    ],
    ids=["unilora", "vblora", "frod"],
)
def test_a_place_that_is_not_there_is_refused(config: Any, key: str, tmp_path: Path) -> None:
    adapted(config).save_pretrained(tmp_path)
    changed(tmp_path, outside(key))
    with pytest.raises(UserError, match=rf"{key}.*(outside|has not)"):
        inlay.PeftModel.from_pretrained(build(llama), tmp_path)


def test_frods_own_side_is_found_for_the_shared_side_of_the_file(tmp_path: Path) -> None:
    model = adapted(FrodConfig(sparse_rate=0.0, **TARGETS))
    model.save_pretrained(tmp_path)

    def turn(tensors: dict[str, Tensor]) -> None:
        # what another machine may find as well: the vectors' signs are its choice
        for key in tensors:
            if ".frod_V." in key:
                tensors[key][:, ::2] *= -1

    changed(tmp_path, turn)
    again = inlay.PeftModel.from_pretrained(build(llama), tmp_path)
    torch.testing.assert_close(output(again), output(model), rtol=0, atol=1e-5)


def test_a_rank_that_no_file_bounds_is_refused_before_it_takes_memory() -> None:
    with pytest.raises(UserError, match=r"r=60000 is more than a layer \[32, 32\] has"):
        inlay.get_peft_model(build(llama), UniLoraConfig(r=60_000, target_modules=["q_proj"]))


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_those_of_scikit_learn(seed: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(seed)
    points = torch.svd_lowrank(torch.randn(96, 80), q=20)[0]
    if seed % 2:
        points[10:60] = points[9]  # so few different ones that groups go empty on the way
    theirs = cluster.KMeans(9, init="random", n_init=1, max_iter=10, random_state=123456789)
    found = torch.from_numpy(theirs.fit_predict(points.numpy().copy())).long()
    assert torch.equal(grouped(points, 9), found)
