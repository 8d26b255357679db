"""From zero members to a smaller checkpoint: what it computes, who opens it, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config

import tawny
from tawny.errors import ModelError
from tawny.model import own_blocks
from tawny.progress import Silent
from tawny.report.card import front_matter
from tawny.run.journal import Journal
from tests.tiny import FAMILIES, tiny_model, tokens, with_outliers

KEYS = {"sparsity": 0.3, "pattern": "channels+heads"}


def logits(folder) -> torch.Tensor:
    with torch.no_grad():
        return tawny.load(folder, dtype="float32")(tokens(2, 16)).logits


def pruned(folder, out, **keys):
    return tawny.prune(folder, out, **{**KEYS, "calibration": tokens(4, 24), **keys})


def saved(model, folder, channels):
    """A folder of the model whose blocks keep so many channels; with none, the whole block is zero."""
    blocks = model.get_decoder().layers
    with torch.no_grad():
        for block, count in zip(blocks, channels, strict=True):
            block.mlp.down_proj.weight[:, count:] = 0
            if not count:
                for parameter in (x for x in block.parameters() if x.dim() == 2):
                    parameter.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slim") / "dense"
    sizes = {"hidden_size": 48, "intermediate_size": 600, "num_attention_heads": 8, "num_key_value_heads": 4}
    tiny_model("llama", **sizes).save_pretrained(folder)
    return folder


def test_equal_widths_are_an_ordinary_checkpoint_that_computes_the_same(dense, tmp_path, run):
    record = pruned(dense, tmp_path / "pruned", allocator="uniform")
    assert record.recipe["solver"]["name"] == "obs" and {x.pattern for x in record.linears} == {
        "channels",
        "heads",
    }
    code, out, err = run("slim", tmp_path / "pruned", "--out", tmp_path / "slim", "--json")
    report = json.loads(out)
    assert code == 0 and report["same_widths"] and report["apart"] < 1e-3, err
    assert report["parameters"] == sum(p.numel() for p in tawny.load(tmp_path / "slim").parameters())
    removed = record.zeros - sum((x.zeros for x in record.linears if x.sparsity < x.target), 0)
    assert report["source_parameters"] - report["parameters"] == pytest.approx(removed, rel=0.02)
    assert torch.allclose(logits(tmp_path / "slim"), logits(tmp_path / "pruned"), atol=1e-3)
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["model_type"] == "llama" and "per_layer_config" not in config


def test_channels_are_kept_up_to_a_multiple_and_nothing_else_changes(tmp_path, run):
    sizes = {"hidden_size": 48, "intermediate_size": 600, "num_hidden_layers": 2}
    source = saved(tiny_model("llama", **sizes), tmp_path / "model", [70, 90])
    code, out, err = run("slim", source, "--out", tmp_path / "slim", "--multiple", 64, "--json")
    report = json.loads(out)
    assert code == 0 and [x["intermediate_size"] for x in report["widths"]] == [128, 128], err
    assert report["same_widths"] and torch.allclose(logits(tmp_path / "slim"), logits(source), atol=1e-5)
    for number, says in ((0, "--multiple"), (1000, "give a smaller --multiple")):
        code, _, err = run("slim", source, "--out", tmp_path / "none", "--multiple", number)
        assert code == 2 and says in err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("allocator", ["uniform", "atp"])
def test_experts_become_smaller_together(tmp_path, family, allocator):
    tiny_model(family).save_pretrained(tmp_path / "dense")
    keys = {"pattern": "channels", "solver": "magnitude", "allocator": allocator}
    pruned(tmp_path / "dense", tmp_path / "pruned", **keys)
    report = tawny.slim(tmp_path / "pruned", tmp_path / "slim")
    assert report.parameters < report.source_parameters
    # Widths are no whole times 8 here, and kernels for all experts at once take no others.
    assert torch.allclose(logits(tmp_path / "slim"), logits(tmp_path / "pruned"), atol=1e-3)


def test_a_block_that_leaves_is_counted(dense, tmp_path):
    class Counts(Silent):
        steps = 0

        def step(self, text: str) -> None:
            self.steps += 1

    progress = Counts()
    pruned(dense, tmp_path / "pruned", pattern="blocks")
    report = tawny.slim(tmp_path / "pruned", tmp_path / "slim", progress=progress)
    assert len(report.dropped) == 1 and progress.steps == 3


def test_a_bias_that_no_setting_gives_is_missed_aloud():
    keys = {"pattern": "channels", "sparsity": 0.3, "calibration": tokens(4, 24)}
    record = tawny.prune(tiny_model("qwen2"), solver={"name": "obs", "bias": True}, **keys)
    assert any("has no bias to compensate with" in warning for warning in record.warnings)
    record = tawny.prune(tiny_model("qwen2"), solver="obs", **keys)
    assert not any("bias" in warning for warning in record.warnings)


def test_different_widths_open_through_tawny_and_nothing_else_makes_weights_up(dense, tmp_path, monkeypatch):
    pruned(dense, tmp_path / "pruned", allocator="atp", solver="flap")
    report = tawny.slim(tmp_path / "pruned", tmp_path / "slim")
    assert not report.same_widths and len({tuple(block.items()) for block in report.widths}) == 3
    expected = logits(tmp_path / "pruned")
    assert torch.allclose(logits(tmp_path / "slim"), expected, atol=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=torch.float32)
    assert all(
        block.mlp.down_proj.bias.any() and not block.mlp.up_proj.bias.any() for block in model.model.layers
    )
    made = model.generate(tokens(1, 8), max_new_tokens=4, do_sample=False)
    assert made.shape[1] > 8
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "slim"))
    tawny.pack(tmp_path / "slim", tmp_path / "packed", values="int8")
    assert (logits(tmp_path / "packed") - expected).norm() < 0.3 * expected.norm()
    monkeypatch.setattr(own_blocks, "_build_own", lambda model: None)  # as transformers alone
    with pytest.raises(RuntimeError, match=r"mismatch|shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "slim")


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """A slim model whose blocks have 40, 32 and 48 channels."""
    folder = tmp_path_factory.mktemp("unequal")
    assert not tawny.slim(
        saved(tiny_model("llama"), folder / "zero", (40, 32, 48)), folder / "slim"
    ).same_widths
    return folder / "slim"


@pytest.mark.parametrize("channels", [(24, 24, 24), (24, 32, 30), (0, 32, 48), (0, 32, 32)])
def test_a_slim_model_of_unequal_blocks_is_slimmed_again(unequal, tmp_path, channels):
    model = AutoModelForCausalLM.from_pretrained(unequal, dtype=torch.float32)
    zero = saved(model, tmp_path / "zero", channels)
    report = tawny.slim(zero, tmp_path / "slim")
    left = [count for count in channels if count]
    assert [block["intermediate_size"] for block in report.widths] == left
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert report.same_widths == (len({*left}) == 1)
    assert {own_blocks.KEY, own_blocks.READS_GLOBAL}.isdisjoint(config) == report.same_widths
    assert torch.allclose(logits(tmp_path / "slim"), logits(zero), atol=1e-4)


def test_experts_that_differed_can_become_equal_again_beside_a_block_without_any(tmp_path):
    own = {own_blocks.KEY: {"0": {"moe_intermediate_size": 8}}, own_blocks.READS_GLOBAL: True}
    model = tiny_model("qwen3_moe", **own)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[..., 8:] = 0
    model.save_pretrained(tmp_path / "zero")
    report = tawny.slim(tmp_path / "zero", tmp_path / "slim")
    assert report.same_widths and [x.get("moe_intermediate_size") for x in report.widths] == [8, None, 8]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        ),
        (
            "qwen3_next",
            {
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
            },
        ),
    ],
)
def test_what_keeps_its_width_needs_no_setting_for_it(family, changes, tmp_path):
    """Channels of a convolution and heads of a delta net are no key-value groups."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(("feed_forward.w2", "shared_expert.down_proj")):
                module.weight[:, 8:] = 0
            elif name.endswith("experts"):
                module.down_proj[..., 8:] = 0
    before = model.config.num_key_value_heads
    model.save_pretrained(tmp_path / "zero")
    report = tawny.slim(tmp_path / "zero", tmp_path / "slim")
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert report.same_widths and report.parameters < report.source_parameters and report.apart < 1e-5
    assert config["num_key_value_heads"] == before and "per_layer_config" not in config


def test_experts_are_cut_beside_a_shared_one_that_was_as_wide(tmp_path):
    for wide in (16, 512):  # whichever a set has first
        changes = {"moe_intermediate_size": wide, "shared_expert_intermediate_size": wide}
        model = tiny_model("qwen2_moe", **changes)
        with torch.no_grad():
            for module in model.modules():
                if hasattr(module, "is_transposed"):
                    module.down_proj[..., wide // 2 :] = 0
        folder = tmp_path / str(wide)
        model.save_pretrained(folder / "zero")
        report = tawny.slim(folder / "zero", folder / "slim")
        config = json.loads((folder / "slim" / "config.json").read_text())
        assert report.apart < 1e-5 and config["moe_intermediate_size"] == wide // 2
        assert config["shared_expert_intermediate_size"] == wide


def test_a_slim_mixture_of_unequal_blocks_is_pruned_again(tmp_path):
    own = {own_blocks.KEY: {"0": {"moe_intermediate_size": 8}}, own_blocks.READS_GLOBAL: True}
    model = tiny_model("qwen3_moe", **own)
    before = [
        module.config._experts_implementation
        for module in model.modules()
        if hasattr(module, "is_transposed")
    ]
    record = tawny.prune(model, sparsity=0.5, calibration=tokens(4, 24))
    assert record.sparsity == pytest.approx(0.5, abs=1e-3)
    after = [
        module.config._experts_implementation
        for module in model.modules()
        if hasattr(module, "is_transposed")
    ]
    assert after == before and "eager" not in before


def test_what_else_a_block_has_of_its_own_stays_with_it(tmp_path):
    own = {own_blocks.KEY: {"2": {"rms_norm_eps": 0.5}}, own_blocks.READS_GLOBAL: True}
    model = tiny_model("llama", **own)
    assert model.model.layers[2].input_layernorm.variance_epsilon == 0.5
    report = tawny.slim(saved(model, tmp_path / "zero", (0, 32, 40)), tmp_path / "slim")
    assert report.dropped == [0] and report.apart < 1e-5
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config[own_blocks.KEY]["1"] == {"intermediate_size": 40, "rms_norm_eps": 0.5}


@pytest.mark.parametrize("channels", [(40, 40, 40), (40, 32, 48), (40, 0, 40)])
def test_widths_of_a_model_of_pictures_and_text_are_said_of_its_text(tmp_path, channels):
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=FAMILIES["gemma3_text"],
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=255,
    )
    model = with_outliers(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), 1)
    zero = saved(model, tmp_path / "zero", channels)
    report = tawny.slim(zero, tmp_path / "slim")
    assert report.same_widths == (len({*channels} - {0}) == 1)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (zero, tmp_path / "slim"))
    assert before.keys() == after.keys() and before["vision_config"] == after["vision_config"]
    assert (own_blocks.KEY in after["text_config"]) != report.same_widths
    opened = [
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (zero, tmp_path / "slim")
    ]
    with torch.no_grad():
        expected, made = (model(tokens(2, 16) % 255).logits for model in opened)
    assert torch.allclose(made, expected, atol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_bytes(dense, tmp_path, monkeypatch):
    whole = pruned(dense, tmp_path / "whole")
    commits = []

    def stop(journal, walk, blocks, *rest):
        commit(journal, walk, blocks, *rest)
        commits.append(blocks)
        raise KeyboardInterrupt

    commit = Journal.commit
    monkeypatch.setattr(Journal, "commit", stop)
    monkeypatch.setattr(Journal, "due", lambda self: True)
    with pytest.raises(tawny.errors.Interrupted):
        pruned(dense, tmp_path / "cut")
    monkeypatch.undo()
    assert commits == [1] and pruned(dense, tmp_path / "cut").files == whole.files


def test_what_is_not_zero_as_a_whole_is_refused_by_the_name_that_was_given(dense, tmp_path, run, monkeypatch):
    tawny.prune(dense, tmp_path / "pruned", sparsity=0.5, solver="magnitude", allocator="uniform")
    monkeypatch.setattr("tawny.slimming.run.resolve", lambda source, say: tmp_path / "pruned")
    code, _, err = run("slim", "organisation/model", "--out", tmp_path / "slim")
    assert code == 2 and "organisation/model holds no channel, head or block that is zero as a whole" in err
    assert err.count("error:") == 1
    monkeypatch.undo()
    assert not (tmp_path / "slim").exists()
    code, _, err = run("prune", dense, "--out", tmp_path / "none", "-s", 0.3, "-p", "heads", "-m", "alps")
    assert code == 2 and "choose obs, flap, wanda, magnitude" in err
    with pytest.raises(ModelError, match=r"is packed; .tawny unpack"):
        tawny.slim(tawny.pack(dense, tmp_path / "packed").out, tmp_path / "slim")


def test_training_keeps_members_zero_so_that_slim_cuts_as_much(dense, tmp_path):
    keys = {"allocator": "uniform", "refine.epochs": 1, "calibration": tokens(8, 24)}
    record = pruned(dense, tmp_path / "refined", **keys)
    assert any(made["best_epoch"] for made in record.refined)
    training = {"text": tokens(12, 24), "tokens": 24 * 12, "eval_every": 2, "lr": 1e-3, "compute": "float32"}
    made = tawny.recover(tmp_path / "refined", dense, tmp_path / "recovered", **training)
    assert made.zeros == record.zeros and made.best["perplexity"] < made.start["perplexity"]
    widths = [
        tawny.slim(tmp_path / name, tmp_path / f"{name}-slim").widths for name in ("refined", "recovered")
    ]
    assert widths[0] == widths[1] and widths[0][0]["intermediate_size"] < 600


def test_what_cannot_spend_a_budget_in_a_pattern_says_so_in_one_line(dense, tmp_path, run):
    for verb, more, said in (
        ("search", ["-s", 0.5, "-p", "blocks"], "blocks removes none"),
        ("fit", ["--size", "1MB", "-o", "pattern=channels"], "a fit chooses -o pattern itself"),
    ):
        code, _, err = run(verb, dense, "--out", tmp_path / "found.yaml", *more)
        assert code == 2 and err.count("error:") == 1 and said in err, err
        assert not (tmp_path / "found.yaml").exists()


@pytest.mark.parametrize("behind", ["\n\n# Dense\n", "  \n# Dense", ""])
def test_the_card_keeps_licence_and_base_model_and_a_kind_is_told(dense, tmp_path, behind):
    """Of what is pruned again, the card would else be without them."""
    (dense / "README.md").write_text(f"---\nlicense: apache-2.0\nbase_model: org/base\n---{behind}")
    pruned(dense, tmp_path / "pruned")
    run = json.loads((tmp_path / "pruned" / "run.json").read_text())
    run["recovery"] = {"settings": {"values": "int8"}}  # as `tawny recover --values int8` tells
    (tmp_path / "pruned" / "run.json").write_text(json.dumps(run))
    said = []
    progress = Silent()
    progress.say = said.append
    tawny.slim(tmp_path / "pruned", tmp_path / "slim", progress=progress)
    card = (tmp_path / "slim" / "README.md").read_text()
    assert front_matter(card)["license"] == "apache-2.0" and front_matter(card)["base_model"] == "org/base"
    assert "# slim\n" in card and "parameters are left" in card
    assert any("was solved for int8" in line and "--values" in line for line in said)
    tawny.prune(tmp_path / "slim", tmp_path / "again", sparsity=0.5, solver="magnitude", allocator="uniform")
    assert front_matter((tmp_path / "again" / "README.md").read_text())["license"] == "apache-2.0"
