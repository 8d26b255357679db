"""What a recovery may write to and clear, what it goes on with, and what it refuses: nobody else's folder is lost."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import tawny
from tawny.errors import Interrupted, OutputError, TextError
from tawny.recovery.dense import recover_dense
from tawny.recovery.training import Training
from tawny.run.place import Workplace
from tests.recovery.models import RECIPE, recover_pair, stopped


def snapshot(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def packed(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "pkA"
    tawny.pack(pair[1], folder, "f32")
    return folder


@pytest.fixture
def dense(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "dense")
    return tmp_path / "dense"


def begun(monkeypatch):
    """The steps at which trainings of later calls begin."""
    found = []
    train = Training.train
    monkeypatch.setattr(Training, "train", lambda self: (found.append(self.standing.step), train(self))[1])
    return found


# --- models that are read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_the_teacher_is_never_replaced(pair, packed, dense, tmp_path, kind, overwrite):
    before = snapshot(dense)
    (tmp_path / "link").symlink_to(dense)
    for out in (dense, tmp_path / "link", tmp_path):
        with pytest.raises(OutputError, match=r"(is|holds) the (teacher|model).*choose another --out"):
            recover_pair(pair, out, pair[1] if kind == "plain" else packed, dense, overwrite=overwrite)
    assert snapshot(dense) == before


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_teacher_beside_out_is_not_taken_for_what_a_run_left_there(pair, packed, tmp_path, kind):
    teacher = tmp_path / "out.partial"
    shutil.copytree(pair[0], teacher)
    before = snapshot(teacher)
    with pytest.raises(OutputError, match="is the teacher itself"):
        source = packed if kind == "packed" else pair[1]
        recover_pair(pair, tmp_path / "out", source, teacher, overwrite=True)
    assert snapshot(teacher) == before


def test_a_teacher_called_like_out_dense_is_left_alone(pair, packed, tmp_path):
    teacher = tmp_path / "out.dense"
    shutil.copytree(pair[0], teacher)
    before = snapshot(teacher)
    recover_pair(pair, tmp_path / "out", packed, teacher)
    assert snapshot(teacher) == before


def test_a_source_inside_out_is_not_replaced_with_it(pair, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copytree(pair[1], tmp_path / "out" / "pruned")
    with pytest.raises(OutputError, match="holds the model"):
        recover_pair(pair, tmp_path / "out", tmp_path / "out" / "pruned", overwrite=True)


# --- folders that Tawny did not make ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["notes.txt", "state.safetensors", "0-recovered/a.txt", "before/a.txt"])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_folder_of_the_users_is_neither_used_nor_cleared(pair, packed, tmp_path, kind, content, overwrite):
    foreign = tmp_path / "out.partial"
    (foreign / content).parent.mkdir(parents=True)
    (foreign / content).write_text("of a person")
    before = snapshot(foreign)
    with pytest.raises(OutputError, match=r"which no run of Tawny put there; .*another --out"):
        recover_pair(pair, tmp_path / "out", pair[1] if kind == "plain" else packed, overwrite=overwrite)
    assert snapshot(foreign) == before and not (tmp_path / "out").exists()


def test_a_file_that_came_in_meanwhile_is_left_when_the_run_is_over(pair, tmp_path, monkeypatch):
    measure = Training._measure

    def noting(self):
        (tmp_path / "out.partial" / "notes.txt").write_text("of a person")
        measure(self)

    monkeypatch.setattr(Training, "_measure", noting)
    recover_pair(pair, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_used(pair, tmp_path):
    (tmp_path / "out.partial").mkdir()
    recover_pair(pair, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_is_refused_before_it_made_anything_leaves_nothing(pair, packed, tmp_path):
    (tmp_path / "short.txt").write_text("too short a text")
    with pytest.raises(TextError, match="tokens"):
        recover_pair(pair, tmp_path / "out", packed, text=str(tmp_path / "short.txt"))
    assert not list(tmp_path.glob("out*"))


def test_nothing_of_another_model_is_trained(pair, packed, tmp_path, monkeypatch):
    """Its run died once it was unpacked."""
    tawny.prune(pair[0], tmp_path / "other", recipe={**RECIPE, "sparsity": 0.3})
    tawny.pack(tmp_path / "other", tmp_path / "pkB", "f32")
    seen = []

    def dies(request):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("tawny.recovery.packed.recover_dense", dies)
        patched.setattr(Workplace, "__exit__", lambda self, *_: self.release())
        with pytest.raises(MemoryError):
            recover_pair(pair, tmp_path / "out", packed)
    assert (tmp_path / "out.partial" / "steps" / "unpacked").exists()

    def noting(request):
        seen.append((request.source / "model.safetensors").read_bytes())
        return recover_dense(request)

    monkeypatch.setattr("tawny.recovery.packed.recover_dense", noting)
    recover_pair(pair, tmp_path / "out", tmp_path / "pkB")
    tawny.unpack(tmp_path / "pkB", tmp_path / "own")
    assert seen == [(tmp_path / "own" / "model.safetensors").read_bytes()]


def test_an_identity_that_cannot_be_read_clears_nothing(pair, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal.json").write_text('{"tawny": "something else"}')
    with pytest.raises(OutputError, match="is damaged"):
        recover_pair(pair, tmp_path / "out")
    assert (tmp_path / "out.partial" / "journal.json").exists()


# --- going on --------------------------------------------------------------------------------------------------------


def test_another_packed_model_or_other_settings_are_refused(pair, packed, tmp_path, monkeypatch):
    tawny.prune(pair[0], tmp_path / "more", recipe={**RECIPE, "sparsity": 0.7})
    tawny.pack(tmp_path / "more", tmp_path / "pkB", "f32")
    out = tmp_path / "out"
    stopped(monkeypatch, lambda: recover_pair(pair, out, packed))
    with pytest.raises(OutputError, match=r"model was .*pkA, now .*pkB.*repeat that command"):
        recover_pair(pair, out, tmp_path / "pkB")
    with pytest.raises(OutputError, match=r"lr was 0\.01, now 0\.002"):
        recover_pair(pair, out, packed, lr=2e-3)
    record = recover_pair(pair, out, tmp_path / "pkB", overwrite=True)
    assert record.sparsity == pytest.approx(0.7, abs=1e-3)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("again", [True, False], ids=["repeated", "without --overwrite"])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_stopped_run_with_overwrite_goes_on_and_replaces_out(
    pair, packed, tmp_path, monkeypatch, kind, again
):
    out = tmp_path / "out"
    shutil.copytree(pair[1], out)

    def call(overwrite):
        source = pair[1] if kind == "plain" else packed
        return recover_pair(pair, out, source, overwrite=overwrite)

    stopped(monkeypatch, lambda: call(True))
    assert not (out / "recover.json").exists()
    where = begun(monkeypatch)
    call(again)
    assert where[0] == 3
    assert json.loads((out / "recover.json").read_text())["best"]["step"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if not again:  # the consent ended with the run it was given to
        with pytest.raises(OutputError, match="exists; choose another --out"):
            call(False)


def test_consent_to_replace_out_is_not_that_of_another_run(pair, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(pair[1], out)
    with monkeypatch.context() as patched:  # before there is any state to lose
        patched.setattr(Training, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted):
            recover_pair(pair, out, overwrite=True)
    with pytest.raises(OutputError, match="out exists"):
        recover_pair(pair, out, lr=2e-3)
    assert not (out / "recover.json").exists()


def test_overwrite_discards_a_run_that_began_without_it(pair, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(monkeypatch, lambda: recover_pair(pair, out))
    where = begun(monkeypatch)
    recover_pair(pair, out, overwrite=True)
    assert where == [0]


def test_an_unfinished_pruning_run_is_not_cleared_by_a_recovery(pair, packed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("tawny.pruning.run.write_pages", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted):
            tawny.prune(pair[0], out, recipe=RECIPE)
    for source in (packed, pair[1]):
        with pytest.raises(
            OutputError, match=r'holds an unfinished run that differs .verb was "prune", now "recover'
        ):
            recover_pair(pair, out, source)
    assert tawny.prune(pair[0], out, recipe=RECIPE).resumed == 1
