"""`prune -p experts`: the checkpoint that is left computes what the source does with those experts taken away by hand."""

from __future__ import annotations

import json
from functools import partial
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tawny.errors import Interrupted, UserError
from tawny.pruning.experts import Cut
from tests.reference.experts import logits_without, scores_by_hand
from tests.tiny import tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

_LATENT = {
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MIXTURES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 3},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v2": {
        **_LATENT,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
        "q_lora_rank": None,
    },
    # As wide as there are experts, so that linears of the shared expert look like a router.
    "deepseek_v3": {
        **_LATENT,
        "moe_intermediate_size": 16,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 16,
        "head_dim": 8,
    },
}


def saved(family, folder, **changes):
    model = tiny_model(family, **{**MIXTURES[family], **changes})
    torch.manual_seed(7)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand(buffer.shape))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("solver", ["reap", "fisher"])
@pytest.mark.parametrize("family", MIXTURES)
def test_cut_checkpoint_gives_the_logits_of_the_model_without_these_experts(family, solver, tmp_path):
    model = saved(family, tmp_path / "dense")
    record = tawny.prune(
        tmp_path / "dense",
        tmp_path / "cut",
        pattern="experts",
        solver=solver,
        sparsity=0.25,
        compute="float32",
        calibration=tokens(),
    )
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    ids = tokens(2, 16, seed=3)
    gone = {one["block"]: one["removed"] for one in record.experts}
    expected = logits_without(model, gone, ids)
    assert record.sparsity == pytest.approx(0.25)
    assert len({len(one["removed"]) for one in record.experts}) == 1
    parameters = sum(p.numel() for p in cut.parameters())
    assert parameters == record.parameters < sum(p.numel() for p in model.parameters())
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"`{solver}` chose the" in card and f"the model has {parameters:,} parameters" in card
    torch.testing.assert_close(cut(ids).logits, expected, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(expected, model(ids).logits, atol=1e-2)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_scores_are_those_of_the_definition(family, tmp_path):
    model = saved(family, tmp_path / "dense")
    calibration = tokens()
    for solver in ("reap", "frequency"):
        record = tawny.prune(
            tmp_path / "dense",
            tmp_path / solver,
            pattern="experts",
            solver=solver,
            sparsity=0.25,
            compute="float32",
            calibration=calibration,
        )
        first = record.experts[0]
        expected = scores_by_hand(model, first["block"], calibration, solver)
        torch.testing.assert_close(
            torch.tensor(first["scores"]), expected, rtol=1e-4, atol=1e-6, check_dtype=False
        )
        assert sum(first["chosen"]) == calibration.numel() * first["picks"]


def test_what_rounding_of_narrow_numbers_changes_is_no_other_model(tmp_path):
    """A router of fewer rows is another product, whose bfloat16 results differ in the last digit."""
    deep = MIXTURES["qwen2_moe"] | {"num_hidden_layers": 24}  # few blocks differ by less than 0.001
    tiny_model("qwen2_moe", **deep, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    keys = {"pattern": "experts", "solver": "magnitude", "sparsity": 0.25, "compute": "bfloat16"}
    record = tawny.prune(tmp_path / "dense", tmp_path / "cut", **keys)
    assert record.sparsity == pytest.approx(0.25) and (tmp_path / "cut" / "config.json").exists()


def test_blocks_may_keep_different_numbers_of_experts(tmp_path):
    model = saved("mixtral", tmp_path / "dense")
    allocation = tmp_path / "allocation.yaml"
    shares = {f"model.layers.{index}.*": share for index, share in enumerate((0.25, 0.5, 0.0))}
    allocation.write_text(json.dumps(shares))
    record = tawny.prune(
        tmp_path / "dense",
        tmp_path / "cut",
        pattern="experts",
        allocator=str(allocation),
        sparsity=0.25,
        compute="float32",
        calibration=tokens(),
    )
    assert [len(one["kept"]) for one in record.experts] == [6, 4, 8]
    ids = tokens(2, 16, seed=3)
    gone = {one["block"]: one["removed"] for one in record.experts}
    cut = tawny.load(tmp_path / "cut", dtype=torch.float32)
    torch.testing.assert_close(cut(ids).logits, logits_without(model, gone, ids), atol=2e-4, rtol=2e-4)
    assert any("plain transformers does not" in warning for warning in record.warnings)


def test_last_line_is_the_command_that_counts_loops_beside_the_dense_model(tmp_path, run, monkeypatch):
    saved("mixtral", tmp_path / "dense", vocab_size=len(tiny_tokenizer()))
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    asked = ("-p", "experts", "-s", 0.25, "-m", "magnitude")
    code, out, err = run("prune", "dense", "--out", "cut", *asked)
    assert code == 0, err
    command = out.splitlines()[-1].split("not measured:")[1].split()
    assert command == ["tawny", "eval", "cut", "--against", "dense", "--loops"]
    code, _, err = run(*command[1:], "--text", tmp_path / "none.txt")  # which it reads as it stands
    assert code == 2 and "none.txt" in err.splitlines()[-1]


def test_with_a_text_both_models_write_and_the_last_lines_and_pages_say_how_many_loop(
    tmp_path, run, monkeypatch
):
    saved("mixtral", tmp_path / "dense", vocab_size=len(tiny_tokenizer()))
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tawny, "loops", partial(tawny.loops, prompts=4, tokens=64))  # fewer than a user's
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(topics.values())[:20_000], encoding="utf-8")
    asked = ("-p", "experts", "-s", 0.25, "-m", "magnitude", "--eval", text, "--seqlen", 32)
    code, out, err = run("prune", tmp_path / "dense", "--out", tmp_path / "cut", *asked)
    assert code == 0, err
    loops = json.loads((tmp_path / "cut" / "run.json").read_text())["loops"]
    assert loops["prompts"] == 4 and loops["tokens"] == 64 and loops["against"] == str(tmp_path / "dense")
    said = f"{loops['looped']} of 4 continuations end in a loop, {loops['dense']} of the dense model's"
    shown = out + err
    for page in (shown, *((tmp_path / "cut" / name).read_text() for name in ("README.md", "report.html"))):
        assert said in page.replace("&#39;", "'")


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("llama", {"sparsity": 0.25}, "has no experts that a router picks from"),
        ("mixtral", {"sparsity": 0.8}, "fewer than 2 of 8 experts"),
        ("deepseek_v3", {"sparsity": 0.6}, "fewer than 8 of 16 experts"),
        ("mixtral", {"sparsity": 0.05}, "removes no whole expert"),
        ("mixtral", {"sparsity": 0.25, "solver": "wanda"}, "does not remove experts"),
        ("mixtral", {"sparsity": 0.25, "refine": 1}, "refine trains"),
        ("mixtral", {"sparsity": 0.25, "refit": True}, "refit is for masks of single weights, and experts"),
        ("mixtral", {"sparsity": 0.25, "exclude": ["*.down_proj.0"]}, "experts leave as a whole"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(family, keys, words, tmp_path):
    tiny_model(family, **MIXTURES.get(family, {})).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=words) as refused:
        tawny.prune(tmp_path / "dense", tmp_path / "cut", pattern="experts", calibration=tokens(), **keys)
    assert "\n" not in str(refused.value) and not (tmp_path / "cut").exists()


def test_live_model_is_refused():
    model = tiny_model("mixtral", **MIXTURES["mixtral"])
    with pytest.raises(UserError, match="a live model keeps its shapes"):
        tawny.prune(model, pattern="experts", sparsity=0.25, calibration=tokens())


def test_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    saved("qwen3_moe", tmp_path / "dense")
    keys = {
        "pattern": "experts",
        "solver": "fisher",
        "sparsity": 0.25,
        "compute": "float32",
        "calibration": tokens(),
    }
    whole = tawny.prune(tmp_path / "dense", tmp_path / "whole", **keys)
    monkeypatch.setattr("tawny.run.journal.SHARE", 1e9)
    plain, calls = Cut.visit, []

    def stopping(self, block):
        calls.append(block.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        plain(self, block)

    monkeypatch.setattr(Cut, "visit", stopping)
    with pytest.raises(Interrupted):
        tawny.prune(tmp_path / "dense", tmp_path / "cut", **keys)
    record = tawny.prune(tmp_path / "dense", tmp_path / "cut", **keys)
    assert record.resumed == 1 and calls == [0, 1, 1, 2]
    assert record.files == whole.files and record.experts == whole.experts


def test_what_is_left_learns_from_the_dense_model(tmp_path):
    saved("mixtral", tmp_path / "dense")
    keys = {"pattern": "experts", "sparsity": 0.25, "compute": "float32", "calibration": tokens()}
    record = tawny.prune(tmp_path / "dense", tmp_path / "cut", **keys)
    how = {"text": tokens(24), "seqlen": 24, "tokens": 24 * 4 * 3, "batch": 4, "kl": 1, "lr": 1e-3}
    told = tawny.recover(
        tmp_path / "cut", tmp_path / "dense", tmp_path / "out", held_out=tokens(24)[:4], **how
    )
    assert told.best["kl"] < told.start["kl"] and told.zeros == told.zeros_before == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["sparsity"] == record.sparsity and run["experts"] == record.experts
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(p.numel() for p in made.parameters()) == record.parameters
    with pytest.raises(UserError, match="no sparsity to keep"):
        tawny.recover(tmp_path / "dense", tmp_path / "cut", tmp_path / "no", **how)
