"""The loop over blocks: the order in which visitors are called, what the journal keeps, and how a walk is continued."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tawny.errors import ModelError
from tawny.model.stack import live_stack
from tawny.model.streams import Samples, Stream
from tawny.packed.opening import open_stack
from tawny.progress import Silent, silent
from tawny.run import journal as journal_module
from tawny.run.journal import Journal
from tawny.run.ranks import Ranks
from tawny.run.run import Clock, Run
from tawny.run.walk import Advance, Visitor, walk, walk_back
from tests.tiny import tiny_model, tokens


class Notes(Visitor):
    """Writes down what it is called for; fails at block `fails`."""

    def __init__(self, name, notes, fails=None):
        self.name, self.notes, self.fails, self.seen = name, notes, fails, []

    def begin(self, kept):
        self.seen = list(kept.get(self.name, []))

    @contextmanager
    def around(self, block):
        self.notes.append(("enter", self.name, block.index))
        try:
            yield
        finally:
            self.notes.append(("leave", self.name, block.index))

    def visit(self, block):
        if block.index == self.fails:
            raise KeyError(self.name)
        self.notes.append(("visit", self.name, block.index))
        self.seen.append(float(block.streams["samples"].hidden[0].double().sum()))

    def keep(self, blocks):
        assert len(self.seen) == blocks
        return {self.name: self.seen}


def kept_run(folder):
    folder.mkdir(exist_ok=True)
    journal = Journal(folder)
    journal.load()
    journal.begin()
    return Run(journal, Ranks(alone=True), silent, Clock())


def test_visitors_enter_a_block_before_any_changes_it_and_leave_it_in_reverse():
    notes = []
    stack = live_stack(tiny_model("llama"))
    visitors = [Notes("a", notes), Notes("b", notes), Advance("samples")]
    walk(Run.unkept(silent), stack, {"samples": Samples(tokens())}, visitors)
    steps = [("enter", "a"), ("enter", "b"), ("visit", "a"), ("visit", "b"), ("leave", "b"), ("leave", "a")]
    assert notes == [(*step, index) for index in range(len(stack)) for step in steps]


@pytest.mark.parametrize("ends", [(), ("samples",)])
def test_the_last_block_is_run_only_where_its_output_is_wanted(ends):
    stack = live_stack(tiny_model("llama"))
    given = {"samples": Samples(tokens())}
    stream = walk(Run.unkept(silent), stack, given, [Advance("samples")], ends=ends)["samples"]
    expected = Stream(stack, given["samples"])
    for index in range(len(stack) - (not ends)):
        expected.advance(index)
    assert stream.depth == expected.depth
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, expected.hidden, strict=True))


@pytest.mark.parametrize("fails", [1, 2])
def test_a_walk_that_failed_goes_on_as_one_that_did_not(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SHARE", float("inf"))  # every block is committed
    tiny_model("llama").save_pretrained(tmp_path / "model")
    given = {"samples": Samples(tokens()), "others": Samples(tokens(2, 16, seed=1))}
    visited, streams = {}, {}
    for name, wrong in (("whole", [None]), ("continued", [fails, None, None])):
        for each in wrong:
            stack = open_stack(tmp_path / "model", torch.float32)
            notes = Notes("a", [], each)
            visitors = [notes, Advance("samples", "others")]
            run = kept_run(tmp_path / name)
            if each is not None:
                with pytest.raises(KeyError):
                    walk(run, stack, given, visitors, name="w", ends=["others"])
                assert all(parameter.is_meta for block in stack.blocks for parameter in block.parameters())
            else:
                streams[name] = walk(run, stack, given, visitors, name="w", ends=["others"])
        visited[name] = notes.seen
    assert visited["whole"] == visited["continued"] and len(visited["whole"]) == 3
    assert "samples" not in streams["continued"]  # it was over before the last of them began
    pairs = zip(streams["whole"]["others"].hidden, streams["continued"]["others"].hidden, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(list((tmp_path / "continued" / "steps" / "hidden").iterdir())) == 1


def test_a_phase_is_told_block_by_block_and_a_walk_without_one_adds_its_steps_to_the_phase_before():
    class Told(Silent):
        def __init__(self):
            self.lines = []

        def phase(self, name, total, unit="blocks"):
            self.lines.append((name, total))

        def step(self, text):
            self.lines.append(text)

    progress, stack = Told(), live_stack(tiny_model("llama"))
    names = [stack.name(index) for index in range(len(stack))]
    walk(Run.unkept(progress), stack, {}, [], phase="looking")
    walk(Run.unkept(progress), stack, {}, [])
    assert progress.lines == [("looking", len(stack)), *names, *names]


class Gradients(Visitor):
    """Remembers the gradient in front of every block."""

    def __init__(self, fails=None):
        self.seen, self.fails = {}, fails

    def begin(self, kept):
        self.seen = dict(kept.get("seen", {}))

    @contextmanager
    def around(self, block):
        if block.index == self.fails:
            raise KeyError
        yield

    def visit(self, block):
        self.seen[str(block.index)] = [hidden.tolist() for hidden in block.streams["back"].hidden]

    def keep(self, blocks):
        assert len(self.seen) == blocks
        return {"seen": self.seen}


def weights_of(hidden):
    return torch.linspace(-1, 1, hidden.numel()).view_as(hidden)


def back(run, stack, visitor):
    given = Samples(tokens())
    walk_back(
        run,
        stack,
        given,
        [visitor],
        end=lambda stream, chunk: weights_of(stream.hidden[chunk]),
        name="back",
        phase="asking",
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3_moe"])
def test_a_walk_back_gives_the_gradients_that_the_whole_model_does(family):
    model = tiny_model(family).eval()
    stack, visitor = live_stack(model), Gradients()
    back(Run.unkept(silent), stack, visitor)
    stream = Stream(stack, Samples(tokens()))
    entering = [stream.hidden[0].clone().requires_grad_()]
    with torch.enable_grad():
        for index in range(len(stack)):
            entering.append(stack.differentiable(index, entering[-1], stream.call(index, 0)))
        expected = torch.autograd.grad((entering[-1] * weights_of(entering[-1])).sum(), entering[:-1])
    for index, gradient in enumerate(expected):
        torch.testing.assert_close(torch.tensor(visitor.seen[str(index)][0]), gradient, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("fails", [0, 1])
def test_a_walk_back_that_failed_goes_on_as_one_that_did_not(fails, spilled, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SHARE", float("inf"))  # every block is committed
    tiny_model("llama").save_pretrained(tmp_path / "model")
    seen = {}
    for name, wrong in (("whole", [None]), ("continued", [fails, None, None])):
        for each in wrong:
            run, visitor = kept_run(tmp_path / name), Gradients(each)
            hidden = tmp_path / name / "steps" / "hidden"
            run = replace(run, hidden=hidden if spilled else None)
            hidden.mkdir(parents=True, exist_ok=True)
            stack = open_stack(tmp_path / "model", torch.float32)
            if each is not None:
                with pytest.raises(KeyError):
                    back(run, stack, visitor)
            else:
                back(run, stack, visitor)
        seen[name] = visitor.seen
        assert list(hidden.iterdir()) == []
    assert seen["whole"] == seen["continued"] and len(seen["whole"]) == 3


def test_a_block_without_a_gradient_is_refused_in_one_line():
    with torch.inference_mode():
        model = tiny_model("llama").eval()
    with pytest.raises(ModelError, match=r"has no gradient \(.*\); ask nothing .* \(-o output=none"):
        back(Run.unkept(silent), live_stack(model), Gradients())
