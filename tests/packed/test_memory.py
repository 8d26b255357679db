from __future__ import annotations

import json
import sys

import torch

import tawny
from tests.packed.cases import python
from tests.packed.test_folder import saved

SCRIPT = """
import gc, json, sys
import torch, tawny

def resident(kind):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])

def run(folder):
    model = tawny.load(folder)
    gc.collect()
    return model

ids = torch.tensor([[1, 2]])
with torch.no_grad():
    run(sys.argv[1])(input_ids=ids)  # imports, kernels, pools: what an interpreter with its imports has
    gc.collect()
    before = {kind: resident(kind) for kind in ("VmRSS", "RssAnon")}
    model = run(sys.argv[2])
    loaded = {kind: resident(kind) - value for kind, value in before.items()}
    model(input_ids=ids)
    used = {kind: resident(kind) - value for kind, value in before.items()}
print(json.dumps({"loaded": loaded, "used": used}))
"""


def test_a_loaded_packed_model_takes_the_memory_of_its_file_and_shares_it(tmp_path):
    if not sys.platform.startswith("linux"):
        return
    tawny.pack(saved(tmp_path / "small", dtype=torch.bfloat16), tmp_path / "warm")
    size = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64, "num_attention_heads": 16}
    tawny.pack(saved(tmp_path / "dense", dtype=torch.bfloat16, **size), tmp_path / "packed")
    packed = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    found = json.loads(python(SCRIPT, tmp_path / "warm", tmp_path / "packed").stdout.splitlines()[-1])
    assert packed > 20e6
    assert found["loaded"]["VmRSS"] <= 1.1 * packed, found
    # mapped, not copied: what is this process's own stays far below the weights
    assert found["loaded"]["RssAnon"] <= 0.2 * packed, found
    assert found["used"]["VmRSS"] <= 1.1 * packed + 12e6, found
