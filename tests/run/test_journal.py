"""A run that is killed, however it is killed, goes on to the bytes of one that was not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tawny
from tawny import precision
from tawny.cpu import PRODUCTS
from tawny.errors import CheckpointError, Interrupted, OutputError
from tawny.kernels import native
from tawny.model.identity import own_code
from tawny.progress import Silent
from tawny.run import journal as journal_module
from tawny.run import writer as writer_module
from tawny.run.journal import Journal
from tawny.solvers import SOLVERS
from tawny.solvers.wanda import Wanda
from tests.tiny import tiny_model, tokens

EXEMPT = {"run.json", "README.md", "report.html"}
OPTIONS = {"sparsity": 0.6, "solver": "sparsegpt", "allocator": "owl", "compute": "bfloat16"}


@pytest.fixture
def dense(tmp_path, monkeypatch):
    # Every block is committed, and the little model has several shards.
    monkeypatch.setattr(journal_module, "SHARE", float("inf"))
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 30_000)
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def prune(dense: Path, out: Path, **options):
    return tawny.prune(dense, out, **{**OPTIONS, "calibration": tokens(6, 24), **options})


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in EXEMPT
    }


def killed_after(dense: Path, out: Path, step: int, **options) -> bool:
    """Prune in a child that SIGKILL ends before its `step`-th write to the disk; whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(function):
            def call(*args, **keys):
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **keys)

            return call

        for name in ("fsync", "replace", "unlink", "rename"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            prune(dense, out, **options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_write_goes_on_to_the_bytes_of_an_uninterrupted_one(dense, tmp_path, stride):
    prune(dense, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) > 2
    steps, resumed = 1, 0
    while killed_after(dense, tmp_path / "out", steps):
        # Killed once more on the way, a few writes later, then left in peace.
        killed_after(dense, tmp_path / "out", 1 + steps % 7)
        if not (tmp_path / "out").exists():
            record = prune(dense, tmp_path / "out")
            resumed += record.resumed > 0
        assert files(tmp_path / "out") == expected, steps
        record = json.loads((tmp_path / "out" / "run.json").read_text())
        assert len(record["linears"]) == 21
        remove(tmp_path)
        steps += stride
    assert steps > 30 and resumed


def remove(folder: Path) -> None:
    for name in ("out", "out.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


class PressesCtrlC(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, text: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupted(dense: Path, out: Path, steps: int = 5, **options) -> None:
    with pytest.raises(
        Interrupted, match=r"source is untouched and 2 finished blocks are kept in .*out\.partial"
    ):
        prune(dense, out, progress=PressesCtrlC(steps), **options)


def test_ctrl_c_keeps_finished_blocks_and_the_same_call_goes_on(dense, tmp_path):
    prune(dense, tmp_path / "whole")
    interrupted(dense, tmp_path / "out")
    record = prune(dense, tmp_path / "out")
    assert record.resumed == 1 and files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_source_that_cannot_be_read_for_a_moment_costs_no_work(dense, tmp_path):
    prune(dense, tmp_path / "whole")
    interrupted(dense, tmp_path / "out")

    class MovesAway(Silent):
        def step(self, text: str) -> None:
            if dense.exists():
                dense.rename(tmp_path / "away")

    with pytest.raises(CheckpointError, match="cannot be read"):
        prune(dense, tmp_path / "out", progress=MovesAway())
    (tmp_path / "away").rename(dense)
    assert prune(dense, tmp_path / "out").resumed == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_ctrl_c_before_anything_is_finished_leaves_nothing(dense, tmp_path):
    with pytest.raises(Interrupted, match="nothing was finished"):
        prune(dense, tmp_path / "out", progress=Immediately())
    assert not (tmp_path / "out.partial").exists()


class Immediately(Silent):
    def phase(self, name: str, total: int) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsity": 0.7}, "recipe sparsity was 0.6, now 0.7"),
        ({"solver": "wanda"}, 'recipe solver name was "sparsegpt", now "wanda"'),
        ({"seed": 3}, "recipe seed was 0, now 3"),
        ({"calibration": tokens(6, 24, seed=1)}, "text changed"),
    ],
)
def test_other_arguments_are_refused_with_what_differs(dense, tmp_path, change, said):
    interrupted(dense, tmp_path / "out")
    with pytest.raises(OutputError, match=said):
        prune(dense, tmp_path / "out", **change)
    assert prune(dense, tmp_path / "out").resumed == 1  # nothing was lost by asking


@pytest.mark.skipif(native.kernel_name() == "torch", reason="needs the compiled kernels")
def test_another_model_other_kernels_and_another_allocation_file_are_refused(dense, tmp_path):
    allocation = tmp_path / "allocation.yaml"
    allocation.write_text('"*": 0.6')
    options = {"allocator": "file", "allocator.path": str(allocation)}
    interrupted(dense, tmp_path / "out", steps=2, **options)
    allocation.write_text('"*": 0.6  # the same, one would think')
    with pytest.raises(OutputError, match="recipe allocator sha256 changed"):
        prune(dense, tmp_path / "out", **options)
    allocation.write_text('"*": 0.6')
    config = (dense / "config.json").read_text()
    (dense / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(OutputError, match=r"model config\.json changed"):
        prune(dense, tmp_path / "out", **options)
    (dense / "config.json").write_text(config)
    with native.force("torch"), pytest.raises(OutputError, match=r'machine kernel was .*, now "torch"'):
        prune(dense, tmp_path / "out", **options)
    other = next(name for name in PRODUCTS if name != precision.products())
    with precision.force(other), pytest.raises(OutputError, match=f'machine products was .*, now "{other}"'):
        prune(dense, tmp_path / "out", **options)
    assert prune(dense, tmp_path / "out", **options).resumed == 1


def test_overwrite_starts_over(dense, tmp_path):
    interrupted(dense, tmp_path / "out")
    record = prune(dense, tmp_path / "out", sparsity=0.7, overwrite=True)
    assert record.resumed == 0 and record.sparsity == pytest.approx(0.7, abs=1e-3)


def test_the_same_run_that_overwrites_goes_on_and_another_starts_over(dense, tmp_path):
    prune(dense, tmp_path / "out", sparsity=0.5)
    interrupted(dense, tmp_path / "out", overwrite=True)
    assert prune(dense, tmp_path / "out", overwrite=True).resumed == 1
    prune(dense, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for change in (
        {"sparsity": 0.7},
        {"calibration": tokens(6, 24, seed=1)},
    ):  # known before the text is read, and behind
        interrupted(dense, tmp_path / "out", overwrite=True)
        assert prune(dense, tmp_path / "out", overwrite=True, **change).resumed == 0
        prune(dense, tmp_path / "whole", overwrite=True, **change)
        assert files(tmp_path / "out") == files(tmp_path / "whole")
    interrupted(dense, tmp_path / "out", overwrite=True)
    (tmp_path / "out.partial" / "journal.json").write_text("{}")
    assert (
        prune(dense, tmp_path / "out", overwrite=True).resumed == 0
    )  # what cannot be read is no reason to refuse


def test_who_asked_to_overwrite_once_need_not_ask_again_to_go_on(dense, tmp_path):
    prune(dense, tmp_path / "out", sparsity=0.5)
    interrupted(dense, tmp_path / "out", overwrite=True)
    assert prune(dense, tmp_path / "out").resumed == 1
    with pytest.raises(OutputError, match="exists"):
        prune(dense, tmp_path / "out")


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"sha256": "00", "run": {"version": 1}}', b"\xff\xfe"])
def test_a_damaged_journal_is_one_clear_line_and_loses_nothing(dense, tmp_path, damage):
    interrupted(dense, tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal.json"
    good = journal.read_bytes()
    journal.write_bytes(damage)
    with pytest.raises(OutputError, match="is damaged") as caught:
        prune(dense, tmp_path / "out")
    assert "\n" not in str(caught.value)
    journal.write_bytes(good)
    assert prune(dense, tmp_path / "out").resumed == 1


def test_a_single_flipped_digit_of_the_journal_is_noticed(dense, tmp_path):
    interrupted(dense, tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal.json"
    journal.write_text(journal.read_text().replace('"blocks":2', '"blocks":1'))
    with pytest.raises(OutputError, match="checksum"):
        prune(dense, tmp_path / "out")


def test_a_missing_journal_or_missing_hidden_states_are_said(dense, tmp_path):
    interrupted(dense, tmp_path / "out")
    (state,) = (tmp_path / "out.partial" / "steps" / "hidden").glob("prune*")
    kept = state.read_bytes()
    state.unlink()
    with pytest.raises(OutputError, match=r"prune\.pruned\.00002\.safetensors.* is missing"):
        prune(dense, tmp_path / "out")
    state.write_bytes(kept)
    journal = tmp_path / "out.partial" / "journal.json"
    good = journal.read_bytes()
    journal.unlink()
    with pytest.raises(OutputError, match=r"no journal\.json"):
        prune(dense, tmp_path / "out")
    journal.write_bytes(good)
    assert prune(dense, tmp_path / "out").resumed == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fills_up_on_the_way_keeps_what_is_finished(dense, tmp_path, monkeypatch, code):
    prune(dense, tmp_path / "whole")
    left = 14
    sync = os.fsync

    def failing(handle):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OutputError, match="disk is full" if code == errno.ENOSPC else "read-only"):
        prune(dense, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", sync)
    journal = Journal(tmp_path / "out.partial")
    journal.load()
    assert journal.has_progress and not list(tmp_path.rglob("*.tmp"))
    assert prune(dense, tmp_path / "out").resumed == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_two_runs_never_write_one_folder_at_once(dense, tmp_path):
    class StartsAnother(Silent):
        said = ""

        def step(self, text: str) -> None:
            if not self.said:
                with pytest.raises(OutputError) as caught:
                    prune(dense, tmp_path / "out")
                self.said = str(caught.value)

    progress = StartsAnother()
    prune(dense, tmp_path / "out", progress=progress)
    assert "another process is writing" in progress.said


def test_a_folder_with_foreign_files_is_never_cleared(dense, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"thesis\.txt"):
            prune(dense, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_what_is_due_follows_what_a_commit_costs(tmp_path):
    journal = Journal(tmp_path)
    journal.begin()
    journal.commit("prune", 1, {}, {})
    journal._spent, journal._last = 1.0, time.perf_counter()
    assert not journal.due()
    journal._last -= 1.0 / journal_module.SHARE
    assert journal.due()


def test_a_run_is_not_gone_on_with_by_another_solver_of_the_users_own(dense, tmp_path, monkeypatch):
    """Such a class lies in a notebook, and not among our sources."""

    def defined(divisor):
        namespace = {"Wanda": Wanda, "dataclass": dataclass, "__name__": "notebook"}
        exec(  # as a cell does
            "@dataclass(frozen=True)\nclass Own(Wanda):\n    def solve(self, *args, **keys):\n"
            f"        scale = {divisor}\n        return Wanda.solve(self, *args, **keys)\n",
            namespace,
        )
        return namespace["Own"]

    def run(cls, steps):
        monkeypatch.setitem(SOLVERS, "own", cls)
        interrupted(dense, tmp_path / "out", steps=steps, solver="own")

    run(defined(1), 5)
    with pytest.raises(OutputError, match="own"):
        run(defined(2), 99)
    assert own_code(defined(1)()) == own_code(defined(1)()) != own_code(defined(2)())
    assert own_code(Wanda()) == {}
