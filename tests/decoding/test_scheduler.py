from __future__ import annotations

import functools
import threading
import time
from queue import SimpleQueue

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tawny.decoding import opening
from tawny.decoding.decoder import Decoder
from tawny.decoding.sampling import Sampler
from tawny.decoding.scheduler import _CHUNK, Scheduler, TextRequest, Token, Usage
from tawny.decoding.worker import Full, Worker
from tawny.errors import Interrupted, NumericalError, TextError, UserError
from tests.reference.scheduler import alone
from tests.tiny import BAMBA, tiny_model, tokens

CAPACITY, COUNT = 80, 3


@functools.cache
def model():
    return tiny_model("llama")


def texts(events):
    """Tokens of a listener's events, and the last event."""
    return [e.id for e in events if isinstance(e, Token) and e.id is not None], events[-1]


def ready(length=5, seed=0, most=6, temperature=0.0):
    """A request, made anew: a sampler serves one text."""
    return TextRequest(tokens(1, length, seed)[0], Sampler(temperature, seed=seed), most)


orders = st.one_of(
    st.tuples(
        st.just("submit"),
        st.integers(1, CAPACITY - 1),  # tokens of the prompt
        st.integers(0, 30),
        st.one_of(st.none(), st.integers(1, 12)),
        st.sampled_from([0.0, 2.0]),
    ),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("turn"), st.integers(1, 6)),
)


@settings(max_examples=12, deadline=None)
@example([("submit", 3, 0, 9, 0.0), ("turn", 2), ("submit", 79, 1, None, 0.0), ("submit", 70, 2, 4, 0.0)])
@given(st.lists(orders, max_size=10))
def test_whoever_else_is_served_each_text_is_what_it_is_alone(script):
    with torch.inference_mode():
        scheduler = Scheduler(model(), None, CAPACITY, COUNT)
        asked, jobs, heard, cancelled, joined = [], [], [], {}, []
        for order, *what in script:
            if order == "submit":
                asked.append(functools.partial(ready, *what))
                heard.append([])
                jobs.append(scheduler.submit(asked[-1](), heard[-1].append))
            elif order == "cancel" and what[0] < len(jobs):
                scheduler.cancel(jobs[what[0]])
                cancelled.setdefault(what[0], len(heard[what[0]]))
            for _ in range(what[0] if order == "turn" else 0):
                turn(scheduler, jobs, joined)
        while scheduler.busy:
            turn(scheduler, jobs, joined)
    assert joined == sorted(joined), "first come, first served"
    assert not any(place.taken for place in scheduler.sequences._places)
    for index, request in enumerate(asked):
        made, last = texts(heard[index]) if heard[index] else ([], None)
        wanted, logits = alone(model(), request(), CAPACITY, scheduler.ends)
        if index in cancelled:
            assert len(heard[index]) == cancelled[index], "told something after it was cancelled"
        if index not in cancelled or isinstance(last, Usage):
            assert isinstance(last, Usage) and last.made == len(made)
            assert len(made) == len(wanted)
        same_up_to_a_tie(made, wanted[: len(made)], logits)


def turn(scheduler, jobs, joined):
    """One turn, and what must hold of any."""
    unread = {job: job.sequence and job.sequence.length for job in jobs if job.reading and not job.over}
    growing = {job for job in scheduler.running if not job.reading}
    before = {job: job.made for job in jobs}
    scheduler.turn()
    assert len(scheduler.running) <= COUNT
    joined += [i for i, job in enumerate(jobs) if job in scheduler.running and i not in joined]
    for job in growing:  # nobody waits for another's prompt
        assert job.over or job.made == before[job] + 1
    amounts = []
    for job, length in unread.items():
        if job.sequence is not None or job.over:
            read = len(job.request.ids) if job.sequence is None else job.sequence.length
            amounts.append(read - (job.cached if length is None else length))
    assert sum(amount > 0 for amount in amounts) <= 1
    assert not growing or max(amounts, default=0) <= _CHUNK


def same_up_to_a_tie(made, wanted, logits):
    """Reading in chunks rounds otherwise than at once; only tokens that were as likely may change places."""
    for at, (one, other) in enumerate(zip(made, wanted, strict=True)):
        if one != other:
            assert abs(float(logits[at][one] - logits[at][other])) < 1e-3
            return


@pytest.mark.parametrize("family", ["mistral", "bamba"])
def test_models_with_other_caches_are_served_too(family):
    other = tiny_model(family, **(BAMBA if family == "bamba" else {}))
    heard = [[], [], []]
    with torch.inference_mode():
        scheduler = Scheduler(other, None, CAPACITY, COUNT)
        for number, listener in enumerate(heard):
            scheduler.submit(ready(11 + number, number), listener.append)
        while scheduler.busy:
            scheduler.turn()
    assert not scheduler.sequences.together
    for number, events in enumerate(heard):
        wanted, logits = alone(other, ready(11 + number, number), CAPACITY, scheduler.ends)
        same_up_to_a_tie(texts(events)[0], wanted, logits)


def test_a_broken_text_ends_alone():
    class Breaks(Sampler):
        def __call__(self, logits):
            raise NumericalError("broken")

    heard = [[], []]
    with torch.inference_mode():
        scheduler = Scheduler(model(), None, CAPACITY, COUNT)
        scheduler.submit(ready(), heard[0].append)
        scheduler.submit(TextRequest(tokens(1, 4)[0], Breaks(), 5), heard[1].append)
        while scheduler.busy:
            scheduler.turn()
    assert isinstance(heard[1][-1], NumericalError) and len(heard[1]) == 1
    assert texts(heard[0]) == (alone(model(), ready(), CAPACITY, set())[0], Usage("length", 5, 0, 6))


def test_a_broken_step_of_texts_that_take_turns_ends_one(monkeypatch):
    heard, step = [[], []], Decoder.step
    other = tiny_model("mistral")

    def breaks(self, token):
        if self.length == 9:
            raise RuntimeError("broken")
        return step(self, token)

    monkeypatch.setattr(Decoder, "step", breaks)
    with torch.inference_mode():
        scheduler = Scheduler(other, None, CAPACITY, COUNT)
        scheduler.submit(ready(8), heard[0].append)
        scheduler.submit(ready(20), heard[1].append)
        while scheduler.busy:
            scheduler.turn()
    assert isinstance(heard[0][-1], RuntimeError)
    assert isinstance(heard[1][-1], Usage) and heard[1][-1].made


def test_likelihoods_of_a_prompt_are_those_of_a_forward():
    ids, heard = tokens(1, 9)[0], []
    with torch.inference_mode():
        scheduler = Scheduler(model(), None, CAPACITY, COUNT)
        scheduler.submit(TextRequest(ids, Sampler(), 3, likelihoods=2, of_prompt=True), heard.append)
        while scheduler.busy:
            scheduler.turn()
        logs = model()(input_ids=ids[None]).logits[0].log_softmax(-1)
    first, *rest = heard[0]
    assert first is None and [one.logprob for one in rest] == pytest.approx(
        [float(logs[i, token]) for i, token in enumerate(ids[1:])], abs=1e-4
    )
    assert all(
        len(one.top) == 2 and one.top[0][1] == pytest.approx(float(logs[i].max()), abs=1e-4)
        for i, one in enumerate(rest)
    )
    made, last = texts(heard)
    assert len(made) == 3 and last.finish == "length"
    assert heard[1].likelihood.logprob == pytest.approx(float(logs[-1, made[0]]), abs=1e-4)


def test_a_worker_serves_threads_refuses_what_is_too_much_and_ends_at_once():
    done, heard = threading.Event(), []

    def listen(event):
        heard.append(event)
        if not isinstance(event, Token):
            done.set()

    with Worker(model(), None, capacity=CAPACITY, count=1, queue=1) as worker:
        with pytest.raises(TextError, match="200 tokens and the context is 80"):
            worker.submit([ready(200)], [listen])
        worker.submit([ready()], [listen])
        assert done.wait(20) and texts(heard)[0] == alone(model(), ready(), CAPACITY, set())[0]
        assert worker.running == worker.waiting == 0
        slow = Slow()
        ends = [[], []]
        orders = worker.submit([TextRequest(tokens(1, 4)[0], slow, 70)], [ends[0].append])
        assert slow.entered.wait(20)
        worker.submit([ready()], [ends[1].append])
        with pytest.raises(Full, match="1 requests wait and 1 may"):
            worker.submit([ready()], [listen])
        worker.cancel(orders)
        slow.may.set()
        late = time.monotonic() + 20
        while not ends[1]:
            assert time.monotonic() < late, "the place was not given back"
            time.sleep(0.001)
        assert slow.calls == 1, "a cancelled text made another step"
        last = []
        worker.submit([TextRequest(tokens(1, 4)[0], Sampler(), 100)], [last.append])
    assert isinstance(last[-1], Interrupted | Usage)
    with pytest.raises(Interrupted):
        worker.submit([ready()], [listen])


def test_a_worker_tries_a_model_out_while_no_other_runs_it():
    shared, held = model(), []
    worker = Worker(shared, None, capacity=CAPACITY, count=1, queue=1)
    make = worker._make
    with opening.ready(shared) as lock:

        def trying():
            held.append(lock._is_owned())
            return make()

        worker._make = trying
        with worker:
            pass
    assert held == [True]


def test_whoever_waits_is_told_that_a_worker_broke(monkeypatch):
    heard, told = [], threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)  # where its traceback goes
    monkeypatch.setattr(Scheduler, "turn", lambda self: 1 / 0)
    with Worker(model(), None, capacity=CAPACITY, count=1, queue=1) as worker:
        worker.submit([ready()], [lambda event: (heard.append(event), told.set())])
        assert told.wait(20) and isinstance(heard[0], ZeroDivisionError)
        with pytest.raises(Interrupted):
            worker.submit([ready()], [heard.append])
        assert not worker.alive
    monkeypatch.setattr("tawny.decoding.sequences.free_memory", lambda: 1000)
    with pytest.raises(UserError, match="of memory are free"):
        Worker(model(), None, capacity=CAPACITY, count=1, queue=1).__enter__()


def test_a_worker_that_is_not_waited_for_ends_before_python_may():
    class Impatient(SimpleQueue):
        def get(self):
            super().get()
            raise KeyboardInterrupt

    worker = Worker(model(), None, capacity=CAPACITY, count=1, queue=1)
    worker._started = Impatient()
    with pytest.raises(KeyboardInterrupt):
        worker.__enter__()
    assert not worker.alive and not worker._thread.is_alive()


class Slow(Sampler):
    """Stays in its first choice until it may go on."""

    def __init__(self):
        super().__init__()
        self.entered, self.may, self.calls = threading.Event(), threading.Event(), 0

    def __call__(self, logits):
        self.calls += 1
        self.entered.set()
        self.may.wait(20)
        return super().__call__(logits)
