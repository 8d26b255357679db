"""The place of a run: what may be written, cleared and continued."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from tawny.errors import CheckpointError, OutputError
from tawny.model import durable
from tawny.run.journal import JOURNAL
from tawny.run.place import Workplace, place_of, spare
from tawny.run.writer import CheckpointWriter


def claimed(
    out: Path, *, source: Path | None = None, overwrite: bool = False, continues: bool = False
) -> Workplace:
    place = Workplace(out)
    reads = [] if source is None else [("model", source)]
    place.claim(overwrite=overwrite, reads=reads, continues=continues)
    return place


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("inside", [".", "checkpoint-5", "runs/checkpoint-5"])
def test_a_folder_that_holds_the_source_is_never_replaced(inside, tmp_path):
    model_in(tmp_path / "m")
    source = tmp_path / "m" / inside
    if inside != ".":
        model_in(source)
    with pytest.raises(OutputError, match=r"is the model itself|holds the model"):
        claimed(tmp_path / "m", overwrite=True, source=source)
    assert (source / "model.safetensors").read_bytes() == b"weights"


def test_a_link_to_the_source_or_around_it_is_refused_as_well(tmp_path):
    source = model_in(tmp_path / "m" / "checkpoint-5")
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with pytest.raises(OutputError, match="holds the model"):
        claimed(tmp_path / "link", overwrite=True, source=source)
    (tmp_path / "other").symlink_to(source)
    with pytest.raises(OutputError, match="holds the model"):
        claimed(tmp_path / "m", overwrite=True, source=tmp_path / "other")


def test_a_source_that_lies_in_the_unfinished_folder_is_not_cleared(tmp_path):
    source = model_in(tmp_path / "m.partial" / "checkpoint")
    with pytest.raises(OutputError, match=r"m\.partial holds the model"):
        claimed(tmp_path / "m", source=source)
    assert (source / "model.safetensors").is_file()


def test_a_folder_beside_or_inside_the_source_may_be_replaced(tmp_path):
    source = model_in(tmp_path / "m")
    for out in (tmp_path / "m-pruned", source / "pruned"):
        model_in(out)
        claimed(out, overwrite=True, source=source).discard()
        assert (out / "config.json").is_file() and (source / "model.safetensors").is_file()


def test_a_folder_without_a_name_of_its_own_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "here" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="here exists"):
        claimed(Path())
    output = claimed(Path(), overwrite=True)
    assert output.path == tmp_path / "here.partial"
    output.discard()
    assert not output.path.exists()
    monkeypatch.chdir(tmp_path / "here" / "below")
    output = claimed(Path(".."), overwrite=True)
    assert (output.out, output.path) == (tmp_path / "here", tmp_path / "here.partial")
    output.discard()


def test_the_root_is_refused_in_one_line():
    with pytest.raises(OutputError, match=r"^/ is the root of the file system; choose a folder"):
        claimed(Path("/"), overwrite=True)


def test_an_unfinished_run_is_only_cleared_by_consent(tmp_path):
    journal = tmp_path / "out.partial" / "journal.json"
    journal.parent.mkdir()
    journal.write_text("{}")
    with pytest.raises(OutputError, match="holds an unfinished run: repeat its command"):
        claimed(tmp_path / "out")
    assert journal.exists()
    with pytest.raises(OutputError, match="is damaged"):
        claimed(tmp_path / "out", continues=True)
    assert journal.exists()
    claimed(tmp_path / "out", overwrite=True).discard()
    assert not journal.parent.exists()


def test_a_name_that_links_to_nothing_is_refused_at_once(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "unmounted")
    with pytest.raises(OutputError, match=r"out is a link to nothing \(.*unmounted\)"):
        claimed(tmp_path / "out", overwrite=True)


def test_what_is_replaced_comes_back_where_the_new_folder_cannot_take_its_name(tmp_path, monkeypatch):
    old = model_in(tmp_path / "out")
    output = claimed(tmp_path / "out", overwrite=True)
    made = model_in(output.steps / "checkpoint")
    move = Path.replace

    def stopped(path: Path, target: Path) -> Path:
        if path.name == "checkpoint":
            raise KeyboardInterrupt
        return move(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        output.deliver(made)
    output.discard()
    assert (old / "model.safetensors").read_bytes() == b"weights"
    assert not output.path.exists()


def test_links_to_nothing_and_folders_in_a_source_are_not_carried(tmp_path):
    source = model_in(tmp_path / "source")
    (source / "gone.json").symlink_to(tmp_path / "nothing")
    (source / "folder.json").mkdir()
    (source / "slim.json").write_text("{}")
    output = claimed(tmp_path / "out", source=source)
    writer = CheckpointWriter(output)
    writer.carry(source)
    assert sorted(path.name for path in writer.folder.iterdir()) == ["config.json"]
    output.discard()


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "README.md", "1_Pooling/config.json"])
def test_a_link_that_leads_out_of_a_model_is_refused_before_the_work(tmp_path, name):
    source = model_in(tmp_path / "source")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "config.json").write_text("{}")
    link, _, below = name.partition("/")
    (source / link).symlink_to(tmp_path / "secrets" if below else "../secrets/config.json")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*config.json, outside") as caught:
        claimed(tmp_path / "out", source=source)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("repository", ["models--owner--name", "moved"])
def test_links_of_the_hubs_cache_and_within_a_folder_are_carried(tmp_path, repository):
    blobs, source = tmp_path / repository / "blobs", tmp_path / repository / "snapshots" / ("a" * 40)
    for folder in (blobs, source):
        folder.mkdir(parents=True)
    model_in(tmp_path / "model")
    (tmp_path / "model" / "config.json").rename(blobs / "1f")
    (source / "config.json").symlink_to("../../blobs/1f")
    (source / "LICENSE").write_text("all of it")
    (source / "LICENSE.txt").symlink_to("LICENSE")
    output = claimed(tmp_path / "out", source=source)
    writer = CheckpointWriter(output)
    writer.carry(source)
    assert sorted(path.name for path in writer.folder.iterdir()) == ["LICENSE", "LICENSE.txt", "config.json"]
    assert not any(path.is_symlink() for path in writer.folder.iterdir())
    output.discard()


def test_further_chat_templates_are_carried(tmp_path):
    source = model_in(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    output = claimed(tmp_path / "out", source=source)
    writer = CheckpointWriter(output)
    writer.carry(source)
    assert (writer.folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    output.discard()


def test_a_tilde_is_the_home_folder_as_in_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place_of("~/out") == tmp_path / "out" and place_of(Path("out")) == Path("out")
    with pytest.raises(OutputError, match="~nobody-of-that-name"):
        place_of("~nobody-of-that-name/out")


def test_one_place_under_two_names_is_the_same_place(tmp_path):
    """As on a disk that takes capitals for small letters, or in a container that has a folder mounted twice."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    (tmp_path / "other.gguf").hardlink_to(model)
    with pytest.raises(OutputError, match="is the model itself"):
        spare([tmp_path / "other.gguf"], model, "model")
    spare([tmp_path / "new.gguf"], model, "model")


@pytest.mark.parametrize(
    ("code", "held"), [(errno.EWOULDBLOCK, True), (errno.ENOLCK, False), (errno.ENOSYS, False)]
)
def test_a_file_system_without_locks_is_written_to_without_one(tmp_path, monkeypatch, code, held):
    def flock(*_):
        raise OSError(code, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    if held:
        with pytest.raises(OutputError, match="another process is writing"):
            claimed(tmp_path / "out")
    else:
        claimed(tmp_path / "out").discard()


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch, code, raises):
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    if raises:
        with pytest.raises(OSError, match="no"):
            durable.write(tmp_path / "x", b"data")
    else:
        durable.write(tmp_path / "x", b"data")
    assert (tmp_path / "x").read_bytes() == b"data"


# --- a run that is continued -----------------------------------------------------------------------------------------


def begun(tmp_path, **identity):
    with Workplace(tmp_path / "out") as place:
        place.claim()
        place.require(**identity)
        place.begin()
        place.folder("0-made", lambda path: (path.mkdir(), (path / "hours").write_text("of work")))


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_works_in_is_neither_gone_on_with_nor_discarded(tmp_path, overwrite):
    begun(tmp_path)
    with Workplace(tmp_path / "out") as works, Workplace(tmp_path / "out") as other:
        works.claim()
        with pytest.raises(OutputError, match="another process is writing"):
            other.claim(overwrite=overwrite)
        other.discard()
        assert (works.steps / "0-made" / "hours").exists()
    with Workplace(tmp_path / "out") as place:
        place.claim(overwrite=overwrite)
        assert (place.steps / "0-made").exists() == (not overwrite)
        place.discard()
    assert not place.path.exists()


@pytest.mark.parametrize("ends", [False, True])
def test_what_is_half_discarded_is_begun_anew(tmp_path, monkeypatch, ends):
    begun(tmp_path, seed=0)
    place = Workplace(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            if ends:
                place.claim()
                place.discard()
            else:
                place.claim(overwrite=True)
    place.release()
    assert (place.path / JOURNAL).exists() and (place.steps / "0-made").exists()
    with Workplace(tmp_path / "out") as again:
        again.claim()
        assert not (again.steps / "0-made").exists()


def test_what_was_half_written_goes_before_a_run_goes_on(tmp_path):
    begun(tmp_path)
    half = tmp_path / "out.partial" / "steps" / "1-made.tmp"
    half.write_text("half a state")
    with Workplace(tmp_path / "out") as place:
        place.claim()
        assert not half.exists() and (place.steps / "0-made" / "hours").exists()


def test_files_of_the_user_stay(tmp_path):
    begun(tmp_path)
    with Workplace(tmp_path / "out") as place:
        place.claim()
        (place.path / "notes.txt").write_text("mine")
        place.discard()
        assert [path.name for path in place.path.iterdir()] == ["notes.txt"]


def test_a_run_that_died_as_it_was_delivered_is_over(tmp_path):
    begun(tmp_path)
    place = Workplace(tmp_path / "out")
    place.claim()
    place.journal.state["delivering"] = "0-made"
    place.journal.save()
    (place.steps / "0-made").replace(tmp_path / "out")
    place.release()
    with pytest.raises(OutputError, match="out exists"):
        Workplace(tmp_path / "out").claim()
    assert not place.path.exists()
