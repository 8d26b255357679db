from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects

import tawny
from tawny.errors import CheckpointError, MissingFeature, OutputError
from tawny.report.push import push
from tawny.run import writer
from tests.tiny import tiny_model, tokens


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    tiny_model("llama").save_pretrained(folder / "dense")
    tawny.prune(folder / "dense", folder / "out", sparsity=0.5, calibration=tokens())
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


class Hub:
    """Stands in for the hub's client; remembers what it was told."""

    calls: list = []
    error: Exception | None = None
    hidden = True
    there: tuple[str, ...] = ()

    def create_repo(self, repo, **keys):
        if self.error:
            raise self.error
        self.calls.append(("create", repo, keys))
        return f"https://hub.example/{repo}"

    def repo_info(self, repo):
        return SimpleNamespace(private=self.hidden)

    def list_repo_files(self, repo):
        return self.there

    def upload_folder(self, **keys):
        self.calls.append(("upload", keys))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    Hub.calls, Hub.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_link_that_leads_out_of_the_folder_is_not_uploaded(out, hub, tmp_path):
    (tmp_path / "secret").write_text("word")
    (out / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(
        CheckpointError, match=r"notes\.txt is a link to .*secret, outside the model's folder"
    ):
        push(out, "owner/name")
    assert not hub.calls


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(out, hub):
    report = push(out, "someone/model", dry_run=True)
    assert not hub.calls and report.url == ""
    assert report.files["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert {"README.md", "run.json", "report.html", "config.json", "recipe.yaml"} <= set(report.files)
    assert report.bytes == sum(report.files.values())
    assert len(report.notes) == 2 and "license" in report.notes[0]


def test_a_card_that_is_no_text_is_named_before_anything_is_sent(out, hub):
    (out / "README.md").write_bytes(b"---\nlicense: mit\n---\nCaf\xe9\n")
    with pytest.raises(CheckpointError, match=r"README\.md has metadata the hub would refuse.*utf-8"):
        push(out, "someone/model")
    assert not hub.calls


def test_a_push_uploads_exactly_what_the_dry_run_listed(out, hub):
    (out / "README.md.new").write_text("half")
    (out / ".hidden").write_text("mine")
    (out / "notes[1].txt").write_text("notes")
    (out / ".git" / "objects").mkdir(parents=True)
    (out / ".git" / "objects" / "token").write_text("mine")
    listed = push(out, "someone/model", dry_run=True).files
    report = push(out, "someone/model", private=True)
    (_, repo, keys), (_, uploaded) = hub.calls
    assert uploaded["delete_patterns"] == []
    assert repo == "someone/model" and keys == {"private": True, "exist_ok": True}
    sent = filter_repo_objects(
        [x.relative_to(out).as_posix() for x in out.rglob("*") if x.is_file()],
        allow_patterns=uploaded["allow_patterns"],
    )
    assert sorted(sent) == sorted(listed) and report.url == "https://hub.example/someone/model"
    assert "notes[1].txt" in listed and not {"README.md.new", ".hidden", ".git/objects/token"} & set(listed)


def test_weights_of_another_layout_that_are_there_go(out, hub, monkeypatch):
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "packed-00001.safetensors")
    monkeypatch.setattr(hub, "there", (*old, "model.safetensors", "README.md", "onnx/model.safetensors"))
    push(out, "someone/model")
    assert hub.calls[-1][1]["delete_patterns"] == list(old)


def test_a_public_repository_is_no_private_one(out, hub, monkeypatch):
    monkeypatch.setattr(hub, "hidden", False)
    with pytest.raises(OutputError, match="there and public"):
        push(out, "someone/model", private=True)
    assert [call[0] for call in hub.calls] == ["create"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "run.json").unlink(), "no run.json of Tawny"),
        (lambda out: (out / "run.json").write_text("{}"), "no run.json of Tawny"),
        (lambda out: (out / "journal.json").write_text("{}"), "unfinished"),
        (lambda out: (out / "config.json").unlink(), "no config.json"),
        (lambda out: (out / "model.safetensors").unlink(), "weights are missing"),
        (lambda out: (out / "model.safetensors").write_bytes(b""), "not the file that run.json describes"),
        (lambda out: (out / "README.md").unlink(), "no README.md"),
        (lambda out: (out / "README.md").write_text("# words"), "no metadata"),
        (lambda out: (out / "README.md").write_text("---\n- a list\n---\n"), "metadata"),
    ],
)
def test_a_folder_that_is_not_what_it_should_be_is_refused_in_one_line(out, hub, damage, words):
    damage(out)
    with pytest.raises(CheckpointError, match=words) as caught:
        push(out, "someone/model")
    assert "\n" not in str(caught.value) and not hub.calls


def test_weights_that_nobody_could_open_are_refused(out, hub, tmp_path, monkeypatch):
    tawny.pack(out, tmp_path / "packed", "int8")
    push(tmp_path / "packed", "someone/model", dry_run=True)
    (tmp_path / "packed" / "packed.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"packed\.safetensors\.index\.json is missing or not an index"):
        push(tmp_path / "packed", "someone/model")
    monkeypatch.setattr(writer, "SHARD_BYTES", 30_000)
    tawny.prune(out, tmp_path / "shards", sparsity=0.5, solver="magnitude", allocator="uniform")
    push(tmp_path / "shards", "someone/model", dry_run=True)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    whole = index.read_text()
    index.unlink()
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor the model\.safetensors\.index\.json"
    ):
        push(tmp_path / "shards", "someone/model")
    index.write_text(whole.replace("model-00001-of", "model-00009-of"))
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of \d+ shards named by its index, first model-00009-of"
    ):
        push(tmp_path / "shards", "someone/model")
    assert not hub.calls


def test_an_unfinished_run_and_no_folder_are_refused(out, tmp_path):
    with pytest.raises(CheckpointError, match="unfinished"):
        push(out.rename(tmp_path / "out.partial"), "someone/model")
    with pytest.raises(CheckpointError, match="is not a folder"):
        push(tmp_path / "nowhere", "someone/model")


@pytest.mark.parametrize("repo", ["model", "a/b/c", "some one/model", "owner/--x"])
def test_a_name_that_is_no_repository_is_refused(out, repo):
    with pytest.raises(OutputError, match="OWNER/NAME"):
        push(out, repo, dry_run=True)


def test_what_the_hub_says_is_one_line(out, hub):
    from huggingface_hub.errors import LocalTokenNotFoundError

    hub.error = LocalTokenNotFoundError("no token\nlong story")
    with pytest.raises(MissingFeature, match="hf auth login"):
        push(out, "someone/model")
    hub.error = OSError("no route to host\nmore")
    with pytest.raises(OutputError, match=r"no route to host$"):
        push(out, "someone/model")


def test_the_verb_prints_the_list_and_exits_with_two_on_a_foreign_folder(out, tmp_path, run):
    code, text, err = run("push", out, "someone/model", "--dry-run")
    assert not code and "model.safetensors" in text and "nothing was uploaded" in text, err
    code, text, _ = run("push", out, "someone/model", "--dry-run", "--json")
    assert not code and json.loads(text)["dry_run"] is True
    code, _, err = run("push", tmp_path, "someone/model", "--dry-run")
    assert code == 2 and err.strip().splitlines()[-1].startswith("error:")
