"""The folder beside OUT in which a run of several parts keeps its work."""

from __future__ import annotations

import shutil

import pytest

from tawny.errors import OutputError
from tawny.run.resumable import JOURNAL, WorkFolder


def folder(tmp_path):
    return WorkFolder(tmp_path / "out", "stages", ("*-made",))


def begun(tmp_path, **identity):
    with folder(tmp_path) as work:
        work.open(identity, overwrite=False)
        (work.path / "0-made").mkdir()
        (work.path / "0-made" / "hours").write_text("of work")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_works_in_is_neither_gone_on_with_nor_discarded(tmp_path, overwrite):
    begun(tmp_path)
    with folder(tmp_path) as works, folder(tmp_path) as other:
        works.open({}, overwrite=False)
        with pytest.raises(OutputError, match="another process is writing"):
            other.open({}, overwrite)
        other.discard()
        assert (works.path / "0-made" / "hours").exists()
    with folder(tmp_path) as work:
        work.open({}, overwrite)
        assert (work.path / "0-made").exists() == (not overwrite)
        work.discard()
    assert not work.path.exists()


@pytest.mark.parametrize("ends", [False, True])
def test_what_is_half_discarded_is_begun_anew(tmp_path, monkeypatch, ends):
    begun(tmp_path, seed=0)
    with folder(tmp_path) as work, monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            if ends:
                work.open({"seed": 0}, overwrite=False)
                work.discard()
            else:
                work.open({"seed": 0}, overwrite=True)
    assert (work.path / JOURNAL).exists() and (work.path / "0-made").exists()
    with folder(tmp_path) as again:
        again.open({"seed": 0}, overwrite=False)
        assert not (again.path / "0-made").exists()


def test_what_was_half_written_goes_before_a_run_goes_on(tmp_path):
    begun(tmp_path)
    half = tmp_path / "out.stages" / "1-made.tmp"
    half.write_text("half a state")
    with folder(tmp_path) as work:
        work.open({}, overwrite=False)
        assert not half.exists() and (work.path / "0-made" / "hours").exists()


def test_files_of_the_user_stay(tmp_path):
    begun(tmp_path)
    with folder(tmp_path) as work:
        work.open({}, overwrite=False)
        (work.path / "notes.txt").write_text("mine")
        work.discard()
        assert [path.name for path in work.path.iterdir()] == ["notes.txt"]
