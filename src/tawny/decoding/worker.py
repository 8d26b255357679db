"""A thread that owns a model and makes the texts that others ask for.

    with Worker(model, tokenizer, capacity=4096, count=8, queue=64) as worker:
        orders = worker.submit([request], [listener])   # from any thread; Full when too many wait
        worker.cancel(orders)                           # before the next step

Listeners are called in the worker's thread and must not raise. Leaving the `with` ends what runs: the step that is being
made is the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import torch

from tawny.decoding import opening
from tawny.decoding.scheduler import Event, Listener, ScheduledText, Scheduler, TextRequest, Usage
from tawny.errors import Interrupted, UserError


class Full(UserError):
    """As many requests wait as may."""


class Submission:
    """A request that the worker was given."""

    def __init__(self, request: TextRequest, listener: Listener) -> None:
        self.request, self.listener = request, listener
        self.job: ScheduledText | None = None
        self.over = False


class Worker:
    """Requests of any threads to one model.

    Args:
        capacity: tokens of a prompt and its text together, at most.
        count: requests that run at once.
        queue: requests that may wait for a place.
        threads: torch's threads during a step.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        capacity: int,
        count: int,
        queue: int,
        threads: int | None = None,
    ) -> None:
        self.model, self.threads, self.places, self.queue = model, threads, count, queue
        self._make = partial(Scheduler, model, tokenizer, capacity, count)
        self._pending, self._closed = 0, False
        self._counting = threading.Lock()
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._started: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tawny-worker", daemon=True)
        self._scheduler: Scheduler | None = None

    def __enter__(self) -> Worker:
        self._thread.start()
        try:
            error = self._started.get()
        except BaseException:  # Ctrl-C; Python must not end while the thread is inside torch
            self.__exit__()
            raise
        if error is not None:
            raise error
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._thread.join()

    def end(self) -> None:
        """Let whatever runs or waits fail with `Interrupted`, after the step that is being made; any thread may ask."""
        self._calls.put(partial(self._close, Interrupted("the server ends")))

    @property
    def scheduler(self) -> Scheduler:
        """What it runs; there once the worker was entered."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._closed

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return min(self._pending, self.places)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return self._pending - self.running

    def check_room(self, count: int, ahead: int = 0) -> None:
        """Raise Full if so many more may not wait, after `ahead` that are not submitted yet."""
        before = self._pending + ahead
        if before + count > self.places + self.queue:
            waiting = max(0, before - self.places)
            raise Full(f"{waiting} requests wait and {self.queue} may; try again later")

    def submit(self, requests: Sequence[TextRequest], listeners: Sequence[Listener]) -> list[Submission]:
        """All of them, or none.

        Raises:
            Full: too many wait.
            TextError: a prompt that cannot be continued.
            Interrupted: the worker has ended.
        """
        for request in requests:
            self.scheduler.check(request)
        with self._counting:
            if self._closed:
                raise Interrupted("the server ends")
            self.check_room(len(requests))
            self._pending += len(requests)
            orders = [Submission(*each) for each in zip(requests, listeners, strict=True)]
            for order in orders:
                self._calls.put(partial(self._start, order))
        return orders

    def cancel(self, orders: Sequence[Submission]) -> None:
        """Forget orders, wherever they are; their listeners are told nothing more."""
        self._calls.put(partial(self._stop, orders))

    # --- in the worker's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with opening.ready(self.model) as lock, torch.inference_mode(), opening.threads(self.threads):
                with lock:  # it tries the model out, through hooks that other forwards must not meet
                    self._scheduler = self._make()
                    self.places = self._scheduler.count
                self._started.put(None)
                while not self._closed:
                    self._listen()
                    with lock:
                        self.scheduler.turn()
        except Exception as error:
            if self._scheduler is None:
                self._started.put(error)  # raised by whoever has entered
                return
            # A fault of ours: whoever waits must know that nothing comes any more.
            self._close(error)
            raise

    def _listen(self) -> None:
        """Do what the other threads want; wait for it where there is nothing else to do."""
        try:
            while True:
                call = self._calls.get(block=not (self.scheduler.busy or self._closed))
                call()
        except Empty:
            pass

    def _start(self, order: Submission) -> None:
        def tell(event: Event) -> None:
            if isinstance(event, Usage | Exception):
                self._end(order)
            order.listener(event)

        order.job = self.scheduler.submit(order.request, tell)

    def _stop(self, orders: Sequence[Submission]) -> None:
        for order in orders:
            if not order.over and order.job is not None:
                self.scheduler.cancel(order.job)
                self._end(order)

    def _end(self, order: Submission) -> None:
        order.over = True
        with self._counting:
            self._pending -= 1

    def _close(self, reason: Exception) -> None:
        with self._counting:
            self._closed = True
        while True:
            try:
                self._calls.get_nowait()()
            except Empty:
                break
        self.scheduler.close(reason)
