"""Importance matrices: that they hold what the linears of the whole model receive, under llama.cpp's names, and are read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

import tawny
from tawny import precision
from tawny.errors import CheckpointError, ModelError, OutputError, TextError, UserError
from tawny.exporting.gguf import _Export
from tawny.exporting.imatrix import read_imatrix
from tests.tiny import tiny_model, tokens

IDS = tokens(3, 16)


@pytest.fixture(autouse=True)
def exactly():
    with precision.force("float32"):
        yield


FUSED = ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps")


def saved(folder: Path, family: str, **changes) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def received(folder: Path) -> dict[str, torch.Tensor]:
    """The mean squared inputs of every module that is called with hidden states, by plain hooks on a whole forward."""
    model = tawny.load(folder, dtype=torch.float32)
    means: dict[str, torch.Tensor] = {}

    def hook(name):
        def see(module, args):
            means[name] = args[0].reshape(-1, args[0].shape[-1]).double().square().mean(0).float()

        return see

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(IDS)
    return means


def test_it_holds_the_mean_squared_inputs_under_the_names_that_an_exported_model_has(tmp_path):
    folder = saved(tmp_path / "m", "qwen2")
    report = tawny.export(folder, tmp_path / "i.gguf", "imatrix", calibration=IDS)
    matrix, expected = read_imatrix(tmp_path / "i.gguf"), received(folder)
    planned = {
        tensor.name: tensor.unit.targets[0].removesuffix(".weight")
        for tensor in _Export(folder).plan(None)
        if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
    }
    assert matrix.keys() == planned.keys() and len(matrix) == report.tensors == 3 * 7
    for name, module in planned.items():
        assert matrix[name].dtype == torch.float32
        torch.testing.assert_close(matrix[name], expected[module], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_expert_has_a_row_of_the_tokens_routed_to_it(family, tmp_path):
    folder = saved(tmp_path / "m", family)
    tawny.export(folder, tmp_path / "i.gguf", "imatrix", calibration=IDS)
    matrix = read_imatrix(tmp_path / "i.gguf")
    model = tawny.load(folder, dtype=torch.float32)
    inputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(
                lambda module, args, index=index: inputs.__setitem__(index, (args[0], args[1]))
            )
    with torch.no_grad():
        model(IDS)
    assert inputs
    for index, (x, chosen) in inputs.items():
        x = x.reshape(-1, x.shape[-1])
        for expert in range(4):
            rows = x[(chosen.reshape(len(x), -1) == expert).any(1)]
            expected = rows.double().square().mean(0).float() if len(rows) else torch.ones(x.shape[1])
            for name in FUSED:
                torch.testing.assert_close(
                    matrix[f"blk.{index}.{name}.weight"][expert], expected, rtol=1e-5, atol=1e-7
                )
        assert matrix[f"blk.{index}.ffn_down_exps.weight"].shape[0] == 4


def test_an_expert_that_saw_nothing_weighs_its_inputs_alike(tmp_path):
    folder = saved(tmp_path / "m", "mixtral", num_local_experts=8, num_experts_per_tok=1)
    report = tawny.export(folder, tmp_path / "i.gguf", "imatrix", calibration=IDS[:1, :4])
    ones = [
        row
        for name, rows in read_imatrix(tmp_path / "i.gguf").items()
        if "_gate_up_exps" in name or "_down_exps" in name
        for row in rows
        if bool((row == 1).all())
    ]
    assert report.unseen == len(ones) >= 3 * 2 * 4


def test_the_file_says_what_llama_cpp_asks_of_it(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("The owl is a bird. " * 200)
    report = tawny.export(
        "smollm2", tmp_path / "i.gguf", "imatrix", calibration=str(text), samples=2, seqlen=8
    )
    reader = GGUFReader(str(tmp_path / "i.gguf"))
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": [str(text)],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 8,
    }
    counts = [tensor.data.item() for tensor in reader.tensors if tensor.name.endswith(".counts")]
    assert set(counts) == {16.0} and len(counts) == report.tensors == 30 * 7


def test_a_matrix_of_llama_imatrix_is_read(tmp_path):
    def written(sums, counts):
        writer = GGUFWriter(str(tmp_path / "i.gguf"), "llama")
        writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.array(sums, dtype=np.float32))
        if counts is not None:
            writer.add_tensor("blk.0.attn_q.weight.counts", np.array(counts, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return read_imatrix(tmp_path / "i.gguf")["blk.0.attn_q.weight"].tolist()

    assert written([2.0, 4.0], [2.0]) == [1.0, 2.0]
    assert written([[2.0, 4.0], [0.0, 0.0]], [[4.0], [0.0]]) == [[0.5, 1.0], [1.0, 1.0]]
    for sums, counts in (([1.0, 2.0], None), ([1.0, 2.0, 3.0], [1.0, 1.0])):
        with pytest.raises(CheckpointError, match="does not say how many tokens"):
            written(sums, counts)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(CheckpointError, match="are not mean squares"):
            written([wrong, 2.0], [1.0])


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, run):
    folder, out = saved(tmp_path / "m", "qwen2"), tmp_path / "i.gguf"
    empty, dat = tmp_path / "empty.txt", tmp_path / "i.dat"
    empty.write_text(" ")
    dat.write_bytes(b"\x01\x00\x00\x00")
    other = saved(tmp_path / "other", "opt")
    refused = [
        (TextError, "neither a file nor", "smollm2", {"calibration": "nowhere"}),
        (UserError, "--to imatrix takes no --type", folder, {"type": "Q8_0"}),
        (ModelError, "has no name in llama.cpp", other, {}),
    ]
    for error, said, source, keys in refused:
        with pytest.raises(error, match=said):
            tawny.export(source, out, "imatrix", **{"calibration": IDS, **keys})
    with pytest.raises(OutputError, match="never overwritten"):
        tawny.export(folder, folder / "model.safetensors", "imatrix", calibration=IDS, overwrite=True)
    with pytest.raises(UserError, match="--to gguf takes no --calibration and no --samples"):
        tawny.export(folder, out, calibration="wiki", samples=4)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_imatrix(dat)
    code, _, err = run("export", "smollm2", "--to", "imatrix", "--out", str(out), "--calibration", str(empty))
    assert code == 2 and "is empty" in err.splitlines()[-1] and "Traceback" not in err
    assert not out.exists()
