from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tawny.decoding.decoder import Decoder
from tawny.decoding.sequences import Sequences
from tawny.decoding.swapped import kernels
from tawny.errors import UserError
from tawny.kernels import native
from tests.decoding.greedy import prune
from tests.decoding.test_decoder import LEVELS, compiled, packed
from tests.tiny import BAMBA, tiny_model, tokens

CAPACITY, COUNT = 24, 3
RECURRENT = {
    "block_types": ["recurrent", "recurrent", "attention"],
    "lru_width": 32,
    "attention_window_size": 8,
    "head_dim": 8,
}


def alone(model, ids):
    """Logits after all of these tokens, by the model's own forward and nothing else."""
    return Decoder(model, len(ids), quick=False).prefill(ids).float()


def close(made, wanted, bound=1e-4):
    assert (made - wanted).norm() <= bound * wanted.norm() + 1e-4


MODELS = {
    "llama": (lambda: tiny_model("llama"), True, True),
    "mixtral": (lambda: tiny_model("mixtral"), True, True),
    "olmoe": (lambda: tiny_model("olmoe"), False, True),
    "gemma3_text": (lambda: tiny_model("gemma3_text"), False, False),
    "bamba": (lambda: tiny_model("bamba", **BAMBA), False, False),
}
# Two sets of rotary angles: for texts up to 12 tokens, and for longer ones.
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
PHI = {"sliding_window": 99, "original_max_position_embeddings": 12}
MODELS |= {
    "longrope": (lambda: tiny_model("llama", rope_parameters={**LONG}), False, False),
    "phi3": (lambda: tiny_model("phi3", rope_parameters={**LONG}, **PHI), False, False),
}
_made = {}


def model_of(family):
    return _made.setdefault(family, MODELS[family][0]())


@compiled
@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=12, deadline=None)
@example([("b", 0), ("r", 9), ("b", 3), ("r", 9), ("s", 1)])  # two of different lengths in one step
@given(st.lists(st.tuples(st.sampled_from("bbrrsssse"), st.integers(0, 9)), max_size=40))
def test_whoever_else_is_there_each_sequence_gets_what_it_would_get_alone(family, actions):
    model, (_, together, keeps) = model_of(family), MODELS[family]
    # Few first tokens, so that prompts often begin alike.
    texts = [torch.cat([tokens(1, 9, seed=n % 3)[0], tokens(1, n, seed=n + 5)[0]]) for n in range(1, 10)]
    with torch.inference_mode(), kernels(model):
        sequences = Sequences(model, CAPACITY, COUNT)
        assert (sequences.together, sequences.keeps) == (together, keeps)
        going: dict = {}  # sequence: the tokens it has been given
        for action, number in actions:
            ready = [s for s in going if s.length >= len(s.ids)]
            if action == "b":
                ids = texts[number % len(texts)]
                if len(going) == COUNT:
                    with pytest.raises(UserError, match="places are taken"):
                        sequences.begin(ids)
                else:
                    one = sequences.begin(ids)
                    assert one.cached < len(ids) and (keeps or not one.cached)
                    going[one] = ids
            elif action == "r" and (reading := [s for s in going if s not in ready]):
                one = reading[number % len(reading)]
                logits = sequences.read(one, 1 + number)
                assert (logits is None) == (one.length < len(one.ids))
                if logits is not None:
                    close(logits.float(), alone(model, going[one]))
            elif action == "s" and (some := [s for s in ready if s.length < CAPACITY][: 1 + number % COUNT]):
                given_tokens = {s: (7 * number + s.length) % 60 for s in some}
                made = sequences.step(given_tokens)
                for one in some:
                    going[one] = torch.cat([going[one], torch.tensor([given_tokens[one]])])
                    close(made[one].float(), alone(model, going[one]))
            elif action == "e" and going:
                one = list(going)[number % len(going)]
                sequences.end(one)
                del going[one]


@compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("values", [None, "bf16", "int8", "int4"])
def test_a_step_of_eight_is_eight_steps_of_one(level, values, monkeypatch):
    monkeypatch.setattr(Sequences, "_proved", lambda self: True)  # rounding weighs much in so small a model
    model = tiny_model("llama", hidden_size=136, intermediate_size=200, dtype=torch.bfloat16)
    model = model if values is None else packed(prune(model), values)
    ids = tokens(8, 12)
    with torch.inference_mode(), kernels(model), native.force(level):
        sequences = Sequences(model, 16, 8)
        assert sequences.together
        each = [sequences.begin(row) for row in ids]
        wanted = []
        for one in each:
            sequences.read(one, 99)
            wanted.append(sequences.step({one: 5})[one].clone())
            one.length -= 1
        made = sequences.step(dict.fromkeys(each, 5))
    for one, alone_ in zip(each, wanted, strict=True):
        # Products of several tokens add in another order than those of one; both round to 16 bits in between.
        assert (made[one] - alone_).norm() <= 0.03 * alone_.norm()


@compiled
def test_a_prompt_that_was_read_is_not_read_again(monkeypatch):
    model, ids = tiny_model("llama"), tokens(1, 20)[0]
    with torch.inference_mode(), kernels(model):
        sequences = Sequences(model, 32, 2)
        one = sequences.begin(ids)
        sequences.read(one, 32)
        sequences.end(one)
        again = sequences.begin(ids)
        other = sequences.begin(torch.cat([ids[:15], tokens(1, 5, seed=9)[0]]))
        assert (again.cached, other.cached) == (19, 15)
        with monkeypatch.context() as patched:  # its last token is made like one that follows
            patched.setattr(again.decoder, "prefill", lambda part: pytest.fail("a forward"))
            close(sequences.read(again, 1).float(), alone(model, again.ids))
        close(sequences.step({again: 7})[again].float(), alone(model, torch.cat([ids, torch.tensor([7])])))
        close(sequences.read(other, 99).float(), alone(model, other.ids))


def test_prompts_are_kept_where_rotary_angles_change_beyond_the_capacity():
    with torch.inference_mode():
        assert Sequences(model_of("longrope"), 12, 1).keeps
        assert not Sequences(model_of("longrope"), 13, 1).keeps


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("tawny.decoding.sequences.free_memory", lambda: 10_000_000)
    with torch.inference_mode(), pytest.raises(UserError, match="room for"):
        Sequences(model, 1 << 20, 4)
    sequences = Sequences(model, 8, 1)
    with pytest.raises(UserError, match="expected 1 to 8"):
        sequences.begin(torch.arange(9))


@compiled
def test_a_prompt_that_another_reads_meanwhile_is_not_read_again():
    """Of texts that begin together, each takes over what any other has read."""
    model, ids = tiny_model("llama"), tokens(1, 20)[0]
    read, prefill = [], Decoder.prefill

    def counted(self, part):
        read.append(len(part))
        return prefill(self, part)

    with torch.inference_mode(), kernels(model), pytest.MonkeyPatch.context() as patched:
        sequences = Sequences(model, 32, 3)
        patched.setattr(Decoder, "prefill", counted)
        made = [sequences.begin(ids) for _ in range(3)]
        logits = dict.fromkeys(made)
        while any(found is None for found in logits.values()):
            for one in made:
                if logits[one] is None and (found := sequences.read(one, 5)) is not None:
                    logits[one] = found.float().clone()
        assert sum(read) == 20 and [one.length for one in made] == [20] * 3
        for found in logits.values():
            close(found, alone(model, ids))
        close(
            sequences.step({made[0]: 5, made[1]: 7})[made[1]].float(),
            alone(model, torch.cat([ids, torch.tensor([7])])),
        )


def test_a_model_that_keeps_its_state_on_its_modules_has_room_for_one_text():
    model = tiny_model("recurrent_gemma", **RECURRENT)
    with torch.inference_mode():
        sequences = Sequences(model, 16, 4)
        assert sequences.count == 1
        one = sequences.begin(tokens(1, 5)[0])
        sequences.read(one, 9)
        with pytest.raises(UserError, match="1 places are taken"):
            sequences.begin(tokens(1, 5)[0])
        for family in ("bamba", "gemma3_text", "longrope", "phi3"):
            assert Sequences(model_of(family), 16, 2).count == 2
