"""Files and folders are written whole or not at all, at whichever moment the writer dies."""

from __future__ import annotations

import errno
import os

import pytest

from inlay.checkpoint.atomic import clean_partials, remove_folder, whole_folder, write_text
from inlay.core.errors import UserError


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        write_text(path, "new")
    assert tree(tmp_path) == {"deep/a.txt": "old"}


def write_half(path):
    with whole_folder(path) as folder:
        (folder / "x").write_text("x")
        raise RuntimeError


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_way_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"), whole_folder(tmp_path / "a"):
        pytest.fail("nothing is written")
    assert tree(tmp_path) == {"a/mine": "mine"}


def test_an_empty_folder_in_the_way_is_filled(tmp_path):
    (tmp_path / "a").mkdir()
    with whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
    assert tree(tmp_path) == {"a/x": "x"}


@pytest.mark.parametrize("call", range(1, 9))
def test_killed_at_any_call_a_replaced_folder_is_the_old_or_the_new_one(
    tmp_path, monkeypatch, call
):
    with whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("old")
    pid = os.fork()
    if pid == 0:
        done = 0

        def counted(name):
            real = getattr(os, name)

            def wrapper(*args, **kwargs):
                nonlocal done
                done += 1
                if done == call:
                    os._exit(9)
                return real(*args, **kwargs)

            monkeypatch.setattr(os, name, wrapper)

        for name in ("fsync", "replace", "rmdir", "unlink"):
            counted(name)
        with whole_folder(tmp_path / "a", replace=True) as folder:
            (folder / "x").write_text("new")
        os._exit(0)
    os.waitpid(pid, 0)
    clean_partials(tmp_path)
    assert tree(tmp_path) in ({"a/x": "old"}, {"a/x": "new"})


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    (tmp_path / f".a.{os.getppid()}.partial").mkdir()
    (tmp_path / ".a.999999999.partial").mkdir()  # above any process id
    clean_partials(tmp_path)
    assert os.listdir(tmp_path) == [f".a.{os.getppid()}.partial"]


def test_a_removed_folder_is_gone(tmp_path):
    with whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
    remove_folder(tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_nothing_is_a_users_error(tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match=r"a\.txt"):
        write_text(tmp_path / "a.txt", "x")
    assert os.listdir(tmp_path) == []
