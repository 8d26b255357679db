"""`llama-bench` beside ours, with a small program in its place."""

from __future__ import annotations

import json
import sys

import pytest

import tawny
from tawny.errors import CheckpointError, MissingFeature, RecipeError, UserError
from tests.encoders import tiny_encoder
from tests.tiny import tiny_model

# Answers 100 tokens a second for a prompt, 40 for decoding, and keeps what it was asked.
PROGRAM = f"""#!{sys.executable}
import json, sys
with open(__file__ + ".asked", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
decodes = sys.argv[sys.argv.index("-p") + 1] == "0"
print(json.dumps([{{"model_type": "llama 1B Q4_0", "avg_ts": 40.0 if decodes else 100.0}}]))
"""


@pytest.fixture
def places(tmp_path):
    """A model, a file that begins as GGUF files do, and a folder with the program."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin", PROGRAM)
    return tmp_path


def write_program(folder, text):
    path = folder / "llama-bench"
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_file_takes_turns_with_ours_on_the_same_tokens_and_threads(places, run):
    words = ("--prompt-tokens", 8, "--tokens", 4, "--rounds", 3, "--threads", 1)
    words = ("bench", places / "model", "--against", places / "m.gguf", "--llama", places / "bin", *words)
    code, out, err = run(*words, "--json")
    assert code == 0, err
    speed = json.loads(out)
    against = speed["against"]
    assert against["type"] == "llama 1B Q4_0" and against["file_bytes"] == 64
    assert against["prefill_tokens_per_second"] == 100 and against["decode_tokens_per_second"] == 40
    assert against["decode_ratio"] == pytest.approx(speed["decode_tokens_per_second"] / 40)
    assert against["prefill_ratio_quartiles"] == pytest.approx([x / 100 for x in speed["prefill_quartiles"]])
    asked = [json.loads(line) for line in (places / "bin/llama-bench.asked").read_text().splitlines()]
    assert len(asked) == 2 * 3
    prefill, decode = (dict(zip(words[::2], words[1::2], strict=True)) for words in asked[:2])
    assert (prefill["-p"], prefill["-n"], prefill["-t"]) == ("8", "0", "1")
    assert (decode["-d"], decode["-n"], decode["-t"]) == ("8", "4", "1")
    assert {prefill["-ngl"], decode["-ngl"]} == {"0"}
    shown = run(*words)[1]
    assert "× llama.cpp (" in shown and "llama 1B Q4_0" in shown


def test_a_model_alone_has_nothing_beside_it(places):
    assert tawny.bench(places / "model", prompt_tokens=4, tokens=2, rounds=1).against is None


def test_what_cannot_be_measured_is_refused_before_the_model_is_opened(places):
    file, program = places / "m.gguf", places / "bin"
    refused = [
        (RecipeError, "give both", {"against": file}),
        (RecipeError, "give both", {"llama": program}),
        (MissingFeature, "nowhere is not a program", {"against": file, "llama": places / "nowhere"}),
        (MissingFeature, "model/llama-bench is not a program", {"against": file, "llama": places / "model"}),
        (MissingFeature, "m.gguf is not a program", {"against": file, "llama": file}),
        (CheckpointError, "is not a GGUF file", {"against": program / "llama-bench", "llama": program}),
        (CheckpointError, "No such file", {"against": places / "other.gguf", "llama": program}),
        (CheckpointError, "Is a directory", {"against": places / "model", "llama": program}),
    ]
    for kind, words, given in refused:
        with pytest.raises(kind, match=words):
            tawny.bench(places / "no model", **given)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            f"#!{sys.executable}\nimport sys\nsys.exit('loading\\nerror: failed to load model\\nbye')",
            "failed on .*m.gguf .exit code 1.: error: failed to load model",
        ),
        (f"#!{sys.executable}\nprint('[]')", "printed no result of llama-bench"),
        (f"#!{sys.executable}\nprint('hello')", "printed no result of llama-bench"),
        ("#!/no/such/interpreter\n", "cannot be run: No such file"),
    ],
)
def test_a_program_that_fails_is_one_line(places, program, words):
    given = {"against": places / "m.gguf", "llama": write_program(places, program)}
    with pytest.raises(UserError, match=words) as caught:
        tawny.bench(places / "model", prompt_tokens=4, tokens=2, rounds=1, **given)
    assert "\n" not in str(caught.value)


def test_an_encoder_does_not_stand_beside_llama_cpp(places, run):
    tiny_encoder("bert").save_pretrained(places / "encoder")
    code, _, err = run("bench", places / "encoder", "--llama", places / "bin")
    assert code == 2 and "encoder" in err and "--against" in err
