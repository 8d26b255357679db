from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from tawny.errors import OutputError
from tawny.model import durable
from tawny.run.output import OutputFolder, spare
from tawny.run.resumable import place_of


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
        OutputFolder(tmp_path / "m", overwrite=True, source=source)
    assert (source / "model.safetensors").read_bytes() == b"weights"


def test_a_link_to_the_source_or_around_it_is_refused_as_well(tmp_path):
    source = model_in(tmp_path / "m" / "checkpoint-5")
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with pytest.raises(OutputError, match="holds the model"):
        OutputFolder(tmp_path / "link", overwrite=True, source=source)
    (tmp_path / "other").symlink_to(source)
    with pytest.raises(OutputError, match="holds the model"):
        OutputFolder(tmp_path / "m", overwrite=True, source=tmp_path / "other")


def test_a_source_that_lies_in_the_unfinished_folder_is_not_cleared(tmp_path):
    source = model_in(tmp_path / "m.partial" / "checkpoint")
    with pytest.raises(OutputError, match=r"m\.partial holds the model"):
        OutputFolder(tmp_path / "m", source=source)
    assert (source / "model.safetensors").is_file()


def test_a_folder_beside_or_inside_the_source_may_be_replaced(tmp_path):
    source = model_in(tmp_path / "m")
    for out in (tmp_path / "m-pruned", source / "pruned"):
        model_in(out)
        OutputFolder(out, overwrite=True, source=source).discard()
        assert (out / "config.json").is_file() and (source / "model.safetensors").is_file()


def test_a_folder_without_a_name_of_its_own_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "here" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="here exists"):
        OutputFolder(Path())
    output = OutputFolder(Path(), overwrite=True)
    assert output.work == tmp_path / "here.partial"
    output.discard()
    assert not output.work.exists()
    monkeypatch.chdir(tmp_path / "here" / "below")
    output = OutputFolder(Path(".."), overwrite=True)
    assert (output.out, output.work) == (tmp_path / "here", tmp_path / "here.partial")
    output.discard()


def test_the_root_is_refused_in_one_line():
    with pytest.raises(OutputError, match=r"^/ is the root of the file system; choose a folder"):
        OutputFolder(Path("/"), overwrite=True)


def test_an_unfinished_run_is_only_cleared_by_consent(tmp_path):
    journal = tmp_path / "out.partial" / "journal.json"
    journal.parent.mkdir()
    journal.write_text("{}")
    with pytest.raises(OutputError, match="holds an unfinished run: repeat its command"):
        OutputFolder(tmp_path / "out")
    assert journal.exists()
    OutputFolder(tmp_path / "out", keep=True).release()
    assert journal.exists()
    OutputFolder(tmp_path / "out", overwrite=True).discard()
    assert not journal.parent.exists()


def test_a_name_that_links_to_nothing_is_refused_at_once(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "unmounted")
    with pytest.raises(OutputError, match=r"out is a link to nothing \(.*unmounted\)"):
        OutputFolder(tmp_path / "out", overwrite=True)


def test_what_is_replaced_comes_back_where_the_new_folder_cannot_take_its_name(tmp_path, monkeypatch):
    old = model_in(tmp_path / "out")
    output = OutputFolder(tmp_path / "out", overwrite=True)
    model_in(output.partial / "new")
    move = Path.replace

    def stopped(path: Path, target: Path) -> Path:
        if path.name == "checkpoint":
            raise KeyboardInterrupt
        return move(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        output.finish()
    output.discard()
    assert (old / "model.safetensors").read_bytes() == b"weights"
    assert not output.work.exists()


def test_links_to_nothing_and_folders_in_a_source_are_not_carried(tmp_path):
    source = model_in(tmp_path / "source")
    (source / "gone.json").symlink_to(tmp_path / "nothing")
    (source / "folder.json").mkdir()
    (source / "slim.json").write_text("{}")
    output = OutputFolder(tmp_path / "out", source=source)
    output.carry(source)
    assert sorted(path.name for path in output.partial.iterdir()) == ["config.json"]
    output.discard()


def test_further_chat_templates_are_carried(tmp_path):
    source = model_in(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    output = OutputFolder(tmp_path / "out", source=source)
    output.carry(source)
    assert (output.partial / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
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
            OutputFolder(tmp_path / "out")
    else:
        OutputFolder(tmp_path / "out").discard()


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
