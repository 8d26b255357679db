"""`tawny.fit` to a GGUF file."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch

import tawny
from tawny.choosing import formats
from tawny.errors import CheckpointError, ModelError, OutputError, RecipeError, UserError
from tawny.gguf_kinds import GGUF_KINDS
from tests.exporting.test_gguf import WORDS, words  # noqa: F401
from tests.exporting.test_template import write
from tests.tiny import tiny_model, tokens

SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KEYS = {
    "solver": "sparsegpt",
    "calibration": tokens(24, 24),
    "fit.windows": 2,
    "fit.deciding": 4,
    "to": "gguf",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, words):  # noqa: F811
    """A folder, and the whole GGUF file of it."""
    folder = tmp_path_factory.mktemp("model") / "dense"
    tiny_model("llama", dtype=torch.bfloat16, **SHAPE).save_pretrained(folder)
    whole = folder.with_name("whole.gguf")
    tawny.export(folder, whole, tokenizer_from=words)
    return folder, whole


@pytest.fixture(scope="module")
def fitted(model, tmp_path_factory):
    folder, whole = model
    out = tmp_path_factory.mktemp("fitted") / "small.gguf"
    return tawny.fit(folder, out, bits=4.6, template=whole, **KEYS), out


def test_a_file_is_of_the_size_that_was_asked_for(fitted):
    told, out = fitted
    assert out.stat().st_size == told.bytes <= told.budget
    assert told.bytes > 0.97 * told.budget and told.zeros.startswith("no zeros: the programs that read")
    assert all(
        row["planned"] == row["bytes"] for row in told.finalists
    )  # known to the byte before it is made
    assert not out.with_name("small.gguf.partial").exists()


def test_tensors_have_the_types_that_were_chosen_and_keys_are_kept(fitted, model):
    told, out = fitted
    made, whole = gguf.GGUFReader(str(out)), gguf.GGUFReader(str(model[1]))
    kept = set(whole.fields) - {"general.file_type", "general.quantization_version", "GGUF.tensor_count"}
    for key in kept:
        assert made.fields[key].contents() == whole.fields[key].contents()
    types = {tensor.name: tensor.tensor_type.name for tensor in made.tensors}
    assert list(types) == [tensor.name for tensor in whole.tensors]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, chosen in told.linears.items():
        kind = GGUF_KINDS[chosen["kind"]]
        assert types[names.get_name(f"{name}.weight", try_suffixes=(".weight",))] == kind.type


def test_what_is_told_of_the_file_is_what_the_file_does(fitted, model):
    told, out = fitted
    facts = json.loads(out.with_name("small.gguf.json").read_text())
    assert facts["bytes"] == told.bytes and facts["winner"] == told.winner
    card = out.with_name("small.gguf.md").read_text()
    assert "nats a token" in card and "ollama create small" in card and f"{told.bits:.3f} bits" in card
    row = next(x for x in told.finalists if x["name"] == told.winner)
    deciding = KEYS["calibration"][-KEYS["fit.deciding"] :]  # the last that were kept back
    agreed = tawny.agreement(out, model[0], deciding)
    assert (agreed.kl, agreed.top1) == pytest.approx((row["kl"], row["top1"]), rel=1e-4)


def test_another_size_measures_nothing_again(fitted, model, tmp_path, monkeypatch):
    from tawny.choosing import fit as module

    monkeypatch.setattr(module, "measure", None)
    folder, whole = model
    told = tawny.fit(
        folder,
        tmp_path / "s.gguf",
        bits=3.6,
        template=whole,
        measured=fitted[1],
        **KEYS,
        kinds="q3_k,Q4_K,q2_k,q6_k",
    )
    ends = {row[end] for row in told.finalists for end in ("head", "embedding")} - {None}
    assert {each["kind"] for each in told.linears.values()} | ends <= {"q2_k", "q3_k", "q4_k", "q6_k"}
    assert told.bytes < fitted[0].bytes
    # What is measured does not depend on what was restricted: the first fit is made again of the second.
    out = tmp_path / "again.gguf"
    tawny.fit(folder, out, bits=4.6, template=whole, measured=tmp_path / "s.gguf", **KEYS)
    assert out.read_bytes() == fitted[1].read_bytes()


def test_kinds_restrict_a_choice_and_not_what_is_measured(fitted, model, tmp_path):
    folder, whole = model
    few = tawny.fit(folder, tmp_path / "few.gguf", bits=5.5, template=whole, **KEYS, kinds="q4_0,q8_0")
    assert {each["kind"] for each in few.linears.values()} <= {"q4_0", "q8_0"}
    tawny.fit(folder, tmp_path / "all.gguf", bits=4.6, template=whole, measured=tmp_path / "few.gguf", **KEYS)
    assert (tmp_path / "all.gguf").read_bytes() == fitted[1].read_bytes()


def test_a_fit_that_was_stopped_ends_with_the_same_bytes(fitted, model, tmp_path, monkeypatch):
    from tawny.choosing import formats as module

    folder, whole = model
    through = module.export_through

    def stopped(*args, **keys):
        through(*args, **keys)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "export_through", stopped)
    with pytest.raises((KeyboardInterrupt, tawny.errors.Interrupted)):
        tawny.fit(folder, tmp_path / "small.gguf", bits=4.6, template=whole, **KEYS)
    assert not (tmp_path / "small.gguf").exists()
    monkeypatch.setattr(module, "export_through", through)
    tawny.fit(folder, tmp_path / "small.gguf", bits=4.6, template=whole, **KEYS)
    assert (tmp_path / "small.gguf").read_bytes() == fitted[1].read_bytes()


def test_a_quick_file_has_the_same_kinds_but_is_rounded(fitted, model, tmp_path):
    folder, whole = model
    quick = tawny.fit(
        folder, tmp_path / "q.gguf", bits=4.6, template=whole, measured=fitted[1], quick=True, **KEYS
    )
    assert quick.bytes == fitted[0].bytes and quick.linears == fitted[0].linears
    assert "rounded to its grid" in (tmp_path / "q.gguf.md").read_text()
    # Which is nearer to a dense model of random weights depends on the CPU's order of sums.
    assert (tmp_path / "q.gguf").read_bytes() != fitted[1].read_bytes()


@pytest.mark.parametrize(
    ("out", "keys", "error", "says"),
    [
        ("small", {}, OutputError, "small is no name of a GGUF file; give --out a name such as .*small.gguf"),
        ("folder.gguf", {}, OutputError, r"folder\.gguf is a folder, and a GGUF file is one file"),
        ("card.gguf", {}, OutputError, r"card\.gguf\.md exists; choose another --out or pass --overwrite"),
        ("a.gguf", {"kinds": "q4_k,q9_k"}, RecipeError, "--kinds names 'q9_k'.*types of GGUF files are q8_0"),
        ("a.gguf", {"bits": 1.0}, RecipeError, "cannot be made as small as .*give --size"),
        ("a.gguf", {"template": "config.json"}, RecipeError, "--template config.json: expected a GGUF file"),
        (
            "a.gguf",
            {"template": None},
            ModelError,
            "tokenizer.*: give --template with a whole GGUF file of the model",
        ),
        ("a.gguf", {"kinds": ""}, RecipeError, "--kinds names ''; types of GGUF files are q8_0"),
        (
            "a.gguf",
            {"to": "packed", "kinds": "q4_k"},
            RecipeError,
            "--kinds restricts --to gguf or --to comp",
        ),
        ("a.gguf", {"to": "exl3"}, RecipeError, "fit.to"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(model, tmp_path, out, keys, error, says):
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "card.gguf.md").write_text("mine")
    with pytest.raises(error, match=says) as caught:
        tawny.fit(model[0], tmp_path / out, **{"bits": 4.0, "template": model[1], **KEYS, **keys})
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    assert not (tmp_path / out).is_file() and not (tmp_path / f"{out}.json").exists()


def test_an_impossible_size_leaves_nothing_behind(model, tmp_path, monkeypatch):
    def makes(source, made, progress):
        shutil.copy(model[1], made)

    monkeypatch.setattr(formats, "export_gguf", makes)
    with pytest.raises(RecipeError, match=r"take at least [\d,]+ bytes; give --size (\d+) "):
        tawny.fit(model[0], tmp_path / "a.gguf", bits=1.0, **KEYS)
    assert not list(tmp_path.iterdir())


def test_a_file_and_its_card_are_pushed(fitted, monkeypatch, tmp_path):
    import huggingface_hub

    from tawny.report.push import push
    from tests.report.test_push import Hub

    hub = Hub()
    hub.calls = []
    hub.upload_file = lambda **keys: hub.calls.append(("file", keys))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    listed = push(fitted[1], "someone/small", dry_run=True)
    assert listed.files[fitted[1].name] == fitted[0].bytes and "README.md" in listed.files
    push(fitted[1], "someone/small")
    said = next(call[1] for call in hub.calls if call[0] == "file")
    assert said["path_in_repo"] == "README.md" and said["path_or_fileobj"].endswith("small.gguf.md")
    for path in fitted[1].parent.iterdir():
        shutil.copy(path, tmp_path)
    with (tmp_path / "small.gguf").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"is not the file that its \.json describes"):
        push(tmp_path / "small.gguf", "someone/small")
    (tmp_path / "small.gguf.json").unlink()
    with pytest.raises(CheckpointError, match="only what `tawny fit --to gguf` wrote can be pushed"):
        push(tmp_path / "small.gguf", "someone/small")


def test_experts_of_a_tensor_get_one_type(tmp_path):
    folder = tmp_path / "mixture"
    shape = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16, **shape)
    model.save_pretrained(folder)
    tensors = {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
    whole = write(tmp_path / "whole.gguf", tensors, "F16")
    fitted = tawny.fit(folder, tmp_path / "small.gguf", bits=7.0, template=whole, **KEYS)
    types = {x.name: x.tensor_type.name for x in gguf.GGUFReader(str(tmp_path / "small.gguf")).tensors}
    experts = {name: level["kind"] for name, level in fitted.linears.items() if ".experts." in name}
    fused = {name for name, value in tensors.items() if value.ndim == 3}
    assert experts and fused
    for tensor in fused:
        assert {GGUF_KINDS[kind].type for name, kind in experts.items() if tensor in name} == {types[tensor]}
    assert fitted.bytes == (tmp_path / "small.gguf").stat().st_size <= fitted.budget


def test_a_plan_knows_the_file(fitted, model, run):
    folder, whole = model
    kept = {"solver": "sparsegpt", "calibration.seqlen": 24, "calibration.samples": 24}
    plan = tawny.plan_fit(folder, bits=4.6, to="gguf", template=whole, measured=fitted[1], **kept)
    best = min(fitted[0].finalists, key=lambda row: row["expected"])
    assert (plan.chosen["bytes"], plan.expected) == (best["planned"], best["expected"])
    assert plan.budget == fitted[0].budget and {row["kind"] for row in plan.kinds} == set(GGUF_KINDS)
    small = {row["kind"]: row["bytes"] for row in plan.kinds}
    assert small["q2_k"] < small["q4_k"] < small["q8_0"] and plan.smallest <= small["q2_k"]
    code, out, err = run("plan", "fit", folder, "--bits", 4.6, "--to", "gguf", "--template", whole, "--json")
    assert code == 0 and json.loads(out)["settings"]["to"] == "gguf", err
    code, _, err = run("plan", "fit", folder, "--bits", 4.6, "--to", "gguf")
    assert code == 2 and "give --template" in err and err.count("\n") == 1
