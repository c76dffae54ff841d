"""Checkpoints: whole or not at all, and the newest one that verifies is the one that is read."""

from __future__ import annotations

import json
import os

import pytest
import torch

from inlay.checkpoint.train import find_fault, newest_verified, prune, write_checkpoint
from inlay.core.errors import UserError

TENSORS = {"weights.a": torch.arange(6.0).reshape(2, 3).T, "optimizer.step.a": torch.tensor(3.0)}


def test_what_is_written_is_read(tmp_path):
    write_checkpoint(tmp_path, 7, TENSORS, {"progress": {"step": 7, "loss": 0.1}})
    found = newest_verified(tmp_path)
    assert (found.step, found.state()) == (7, {"progress": {"step": 7, "loss": 0.1}})
    torch.testing.assert_close(found.tensors(), TENSORS, rtol=0, atol=0)
    assert sorted(os.listdir(tmp_path)) == ["step-7"]


def test_the_newest_is_that_of_the_highest_step_not_of_the_last_name(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step, TENSORS, {})
    assert newest_verified(tmp_path).step == 100


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, flip, remove, empty])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_harmed_file_makes_the_checkpoint_before_it_the_newest(tmp_path, harm, name):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, TENSORS, {"step": step})
    harm(tmp_path / "step-2" / name)
    told = []
    assert newest_verified(tmp_path, told.append).step == 1
    [notice] = told
    assert "step-2" in notice


def test_a_manifest_of_another_step_or_with_other_files_does_not_verify(tmp_path):
    written = write_checkpoint(tmp_path, 1, TENSORS, {}).path
    (tmp_path / "step-5").symlink_to(written)
    assert "manifest.json" in find_fault(tmp_path / "step-5")
    manifest = json.loads((written / "manifest.json").read_text())
    del manifest["files"]["state.json"]
    (written / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json" in find_fault(written)


def test_nothing_there_is_none(tmp_path):
    assert newest_verified(tmp_path / "missing") is None


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write_checkpoint(tmp_path, 1, TENSORS, {"time": 1})
    write_checkpoint(tmp_path, 1, TENSORS, {"time": 2})
    assert newest_verified(tmp_path).state() == {"time": 2}
    assert os.listdir(tmp_path) == ["step-1"]


def test_pruning_removes_the_oldest_but_never_the_best_nor_the_newest_that_verifies(tmp_path):
    for step in range(1, 7):
        write_checkpoint(tmp_path, step, TENSORS, {})
    assert prune(tmp_path, 3, keep=2) == [1, 3, 4]
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-5", "step-6"]
    flip(tmp_path / "step-6" / "tensors.safetensors")
    assert prune(tmp_path, 1) == [2, 6]
    assert newest_verified(tmp_path).step == 5


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path):
    write_checkpoint(tmp_path, 1, TENSORS, {})
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"no space left .*step-2"):
            write_checkpoint(tmp_path, 2, {"weights.a": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["step-1"]
    assert newest_verified(tmp_path).step == 1
