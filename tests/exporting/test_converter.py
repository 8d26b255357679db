"""Files of llama.cpp's own converter as templates, where `make llama` has fetched its source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.exporting.test_template import encoded, matched
from tests.tiny import tiny_model

SOURCE = Path(__file__).parents[2] / "build" / "llama" / "source"
# It writes no vocabulary, since tiny models have none; of sentencepiece it needs no more than that it is there.
CONVERT = """
import importlib.machinery, json, sys, types
words = types.ModuleType("sentencepiece")
words.SentencePieceProcessor, words.__spec__ = object, importlib.machinery.ModuleSpec("sentencepiece", None)
sys.modules["sentencepiece"] = words
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, source)
import convert_hf_to_gguf as converter
found = converter.get_model_class
def silent(*args, **kwargs):
    kind = found(*args, **kwargs)
    kind.set_vocab = lambda self: None
    return kind
converter.get_model_class = silent
for folder, out, kind in jobs:
    sys.argv = ["convert", folder, "--outfile", out, "--outtype", kind]
    converter.main()
"""
SHAPE = {"hidden_size": 64, "intermediate_size": 96}
# What each is here for: rows permuted, fused or interleaved, matrices transposed, taken apart, stacked.
FAMILIES = {
    "llama": SHAPE,
    "phi3": SHAPE,
    "glm4": SHAPE,
    "gpt2": {"n_embd": 64, "n_ctx": 128},
    "bloom": {"hidden_size": 64},
    "falcon": {
        "hidden_size": 64,
        "multi_query": False,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "mixtral": SHAPE,
    "gpt_oss": SHAPE,
    "granitemoe": SHAPE,
    "jamba": SHAPE,
    "mamba": {"hidden_size": 64, "intermediate_size": 128, "state_size": 8},
    "minimax_m2": {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "rotary_dim": 8},
}


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE.is_dir(), reason="make llama was not run")
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_files_of_llama_cpps_converter_are_matched_whatever_it_does_to_the_matrices(kind, tmp_path):
    for family, changes in FAMILIES.items():
        tiny_model(family, dtype=torch.bfloat16, **changes).save_pretrained(tmp_path / family)
    jobs = [(str(tmp_path / name), str(tmp_path / f"{name}.gguf"), kind) for name in FAMILIES]
    subprocess.run([sys.executable, "-c", CONVERT, str(SOURCE), json.dumps(jobs)], check=True)
    for family in FAMILIES:
        path, out = tmp_path / f"{family}.gguf", tmp_path / "out.gguf"
        template, source = matched(path, tmp_path / family)
        payloads = {name: encoded(source, name, "F16") for name in template.places}
        template.fill(out, payloads)
        assert template.bytes_with({}) == path.stat().st_size, family
        assert template.bytes_with(dict.fromkeys(payloads, "F16")) == out.stat().st_size, family
        if kind == "f16":  # the same bytes come out, in the order in which the converter put them
            assert out.read_bytes() == path.read_bytes(), family
