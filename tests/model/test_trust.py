"""Code in a model's folder runs only where it was asked for, and nobody is asked on the terminal."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

import tawny
from tawny.errors import ModelError
from tawny.model.source import load_tokenizer
from tests.tiny import tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

CONFIG = """
from pathlib import Path
from transformers import LlamaConfig
Path({ran!r}).touch()
class OwletConfig(LlamaConfig):
    model_type = "owlet"
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_owlet import OwletConfig
class OwletForCausalLM(LlamaForCausalLM):
    config_class = OwletConfig
"""
MAP = {
    "AutoConfig": "configuration_owlet.OwletConfig",
    "AutoModelForCausalLM": "modeling_owlet.OwletForCausalLM",
}


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """A file that exists once the folder's code has run."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # of other processes
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "ran"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path, ran) -> Path:
    made = tmp_path / "owlet"
    tiny_model("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    edit(made / "config.json", model_type="owlet", architectures=["OwletForCausalLM"], auto_map=MAP)
    (made / "configuration_owlet.py").write_text(CONFIG.format(ran=str(ran)))
    (made / "modeling_owlet.py").write_text(MODEL)
    return made


class Terminal(io.StringIO):
    """A user who would say yes."""

    def isatty(self) -> bool:
        return True

    def read(self, *_: object) -> str:
        pytest.fail("somebody was asked")

    readline = read


@pytest.fixture(params=["a terminal", "nothing"])
def stdin(request, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal() if request.param == "a terminal" else None)


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("teacher"), dirs_exist_ok=True))


RECOVERY = {"text": tokens(40), "tokens": 64, "seqlen": 16, "control": True}
PLAIN = {"sparsity": 0.5, "solver": "magnitude", "allocator": "uniform"}
CALLS = {
    "load": tawny.load,
    "plan": lambda folder, **keys: tawny.plan(folder, sparsity=0.5, solver="magnitude", **keys),
    "profile": lambda folder, **keys: tawny.profile(folder, calibration=tokens(), **keys),
    "evaluate": lambda folder, **keys: tawny.evaluate(folder, tokens(2, 16), **keys),
    "agreement": lambda folder, **keys: tawny.agreement(folder, folder, tokens(2, 16), **keys),
    "inspect": tawny.inspect,
    "generate": lambda folder, **keys: tawny.generate(folder, "owl", max_tokens=2, **keys),
    "bench": lambda folder, **keys: tawny.bench(folder, prompt_tokens=2, tokens=2, rounds=1, **keys),
    "pack": lambda folder, **keys: tawny.pack(folder, folder.with_name("packed"), **keys),
    "prune": lambda folder, **keys: tawny.prune(folder, folder.with_name("out"), **PLAIN, **keys),
    "recover": lambda folder, **keys: tawny.recover(
        folder, copied(folder), folder.with_name("out"), **RECOVERY, **keys
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_code_is_refused_in_one_line_and_runs_when_it_was_asked_for(name, folder, ran):
    with pytest.raises(ModelError, match="needs code of its own") as caught:
        CALLS[name](folder)
    assert "\n" not in str(caught.value) and not ran.exists()
    CALLS[name](folder, trust_remote_code=True)
    assert ran.exists()
    with pytest.raises(ModelError, match="needs code of its own"):  # trust ends with the call
        tawny.inspect(folder)


def test_compare_takes_the_answer_into_the_process_of_each_model(folder, ran):
    keys = {"text": None, "rounds": 1, "prompt_tokens": 16, "cache": False}
    refused = tawny.compare([folder], **keys).models[0]["errors"]
    assert refused and all("needs code of its own" in line for line in refused.values()) and not ran.exists()
    assert not tawny.compare([folder], trust_remote_code=True, **keys).models[0]["errors"] and ran.exists()


def test_nobody_is_asked(stdin, folder, ran):
    with pytest.raises(ModelError, match="needs code of its own"):
        tawny.load(folder)
    assert not ran.exists()


def test_the_command_line_takes_the_option(folder, ran, run):
    code, _, said = run("inspect", folder)
    assert code == 2 and "--trust-remote-code" in said and len(said.strip().splitlines()) == 1
    assert not ran.exists()
    assert run("inspect", folder, "--trust-remote-code")[0] == 0 and ran.exists()
    assert run("inspect", folder)[0] == 2


def test_a_pruned_and_packed_folder_keeps_its_code(folder):
    out, packed = folder.with_name("out"), folder.with_name("packed")
    tawny.prune(folder, out, trust_remote_code=True, **PLAIN)
    tawny.pack(out, packed, "f32", trust_remote_code=True)
    assert type(tawny.load(packed, trust_remote_code=True)).__name__ == "OwletForCausalLM"
    with pytest.raises(ModelError, match="needs code of its own"):
        tawny.load(packed)


def test_transformers_own_class_is_used_where_it_knows_the_architecture(folder, ran):
    edit(folder / "config.json", model_type="llama")
    assert type(tawny.load(folder)).__name__ == "LlamaForCausalLM"
    tawny.inspect(folder)
    assert not ran.exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(stdin, tmp_path, ran):
    folder = tmp_path / "own"
    AutoConfig.for_model("vit").save_pretrained(folder)  # has no tokenizer in transformers
    (folder / "configuration_owlet.py").write_text(CONFIG.format(ran=str(ran)))
    own = {"AutoTokenizer": ["configuration_owlet.OwletTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": own}))
    with pytest.raises(ModelError, match="needs code of its own"):
        load_tokenizer(folder)
    assert not ran.exists()
