"""What `/metrics` tells, in Prometheus' words."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tawny.decoding.scheduler import Usage
from tawny.decoding.worker import Worker

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Of one worker.

    waiting: tells how many requests have no place yet.
    """

    def __init__(self, worker: Worker, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._texts, self._seconds = 0, 0.0
        gauges = {
            "tawny_requests_running": ("Requests that have a place", lambda: worker.running),
            "tawny_requests_waiting": ("Requests in the queue", waiting),
        }
        for name, (help, value) in gauges.items():
            Gauge(name, help, registry=self.registry).set_function(value)
        counters = {
            "requests": "Texts by how they ended, and requests that failed",
            "prompt_tokens": "Tokens of prompts",
            "cached_tokens": "Tokens of prompts that were found in the prefix cache",
            "generated_tokens": "Tokens made",
        }
        self.requests, self.prompt, self.cached, self.generated = (
            Counter(f"tawny_{name}", help, ["finish"] if name == "requests" else [], registry=self.registry)
            for name, help in counters.items()
        )
        self.first = Histogram(
            "tawny_first_token_seconds",
            "From request to first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.speed = Histogram(
            "tawny_tokens_per_second",
            "Of one text after its first token",
            buckets=_SPEEDS,
            registry=self.registry,
        )

    def text(self, usage: Usage, seconds: float, first: float | None, speed: float | None) -> None:
        """One text is done, after some seconds. first: seconds to its first token. speed: tokens a second after it."""
        self._texts, self._seconds = self._texts + 1, self._seconds + seconds
        self.requests.labels(usage.finish).inc()
        self.work(usage.prompt, usage.made)
        self.cached.inc(usage.cached)
        if first is not None:
            self.first.observe(first)
        if speed is not None:
            self.speed.observe(speed)

    def work(self, read: int, made: int) -> None:
        """Tokens that were read and made, for a text that ended or for one that nobody waits for any more."""
        self.prompt.inc(read)
        self.generated.inc(made)

    def mean_seconds(self) -> float:
        """That a text has taken so far."""
        return self._seconds / max(1, self._texts)

    def failed(self, why: str) -> None:
        self.requests.labels(why).inc()

    def page(self) -> bytes:
        return bytes(generate_latest(self.registry))
