"""`tawny.serve`: a model behind the OpenAI protocol, in a thread of a notebook or a test, or as a program of its own."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from tawny.decoding import opening
from tawny.decoding.text import Tokenizer
from tawny.decoding.worker import Worker
from tawny.errors import MissingFeature, RecipeError, TawnyError, UserError, first_line
from tawny.model.context import longest_text
from tawny.model.source import load_tokenizer, resolve
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent
from tawny.words import size

if TYPE_CHECKING:
    from tawny.serving.web import Web

_CONTEXT = 4096  # tokens of a sequence, where the user says nothing
_MOST_SEQUENCES, _MOST_QUEUE = 1024, 1_000_000


class Server:
    """A model that is served while a `with` lasts: `with tawny.serve(…) as server: … server.url`.

    name: of the model, to clients.
    """

    def __init__(self, web: Web, worker: Worker, listening: socket.socket, host: str, name: str) -> None:
        self.name, self._web, self._worker, self._socket = name, web, worker, listening
        self._entered = contextlib.ExitStack()
        port = listening.getsockname()[1]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.url = f"{self.address}/v1"  # what clients call `base_url`

    def described(self) -> list[str]:
        """What a person should know of a server that runs, line by line."""
        scheduler = self._worker.scheduler
        sequences = scheduler.sequences
        lines = [
            f"{self.name} at {self.address} (a page to chat) and {self.url} (the OpenAI protocol)",
            f"{scheduler.count} sequences of {scheduler.capacity} tokens, {size(sequences.nbytes)} for keys and values",
        ]
        if not sequences.together and scheduler.count > 1:
            lines.append(
                "this model's sequences take turns: several at once are no faster than one after another"
            )
        return lines

    def run(self, ready: Callable[[], None]) -> None:
        """Serve in this thread until Ctrl-C or SIGTERM; `ready` is called when the server listens."""
        with contextlib.closing(self._socket), self._worker:
            self._socket.listen()  # whoever comes now waits until the loop runs
            ready()
            self._web.run(sockets=[self._socket])

    def __enter__(self) -> Server:
        with contextlib.ExitStack() as entered:
            entered.enter_context(contextlib.closing(self._socket))
            entered.enter_context(self._worker)
            run = self._web.run
            thread = threading.Thread(target=run, args=([self._socket],), name="tawny-server", daemon=True)
            thread.start()
            entered.callback(thread.join)
            while not self._web.started:
                if not thread.is_alive():
                    raise TawnyError("the server has not started; its log says why")
                time.sleep(0.005)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._web.should_exit = True
        self._entered.close()


@opens_models
def serve(
    model: str | Path | nn.Module,
    *,
    tokenizer: Tokenizer | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    allow_open: bool = False,
    max_sequences: int = 8,
    context: int | None = None,
    queue: int = 64,
    timeout: float = 600.0,
    threads: int | None = None,
    log: Callable[[str], None] | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Server:
    """Serve a model over the OpenAI protocol while a `with` lasts.

        with tawny.serve("packed") as server:
            client = openai.OpenAI(base_url=server.url, api_key="none")

    Args:
        model: a folder (dense or packed), hub id, `.gguf` file, `smollm2`, or a live causal model.
        tokenizer: needed for a live model.
        name: of the model to clients; None for what `model` is called.
        host: where to listen. Beyond this machine only with `api_key`, or with `allow_open`.
        port: 0 for any that is free.
        api_key: what clients must send; with it they may come by any `Host`, as through a proxy.
        allow_open: let anybody who reaches this machine use the server.
        max_sequences: texts that are made at once.
        context: most tokens of a prompt and its text; None for the model's own, at most 4096.
        queue: requests that may wait; more are answered with 429.
        timeout: seconds that a request may take, waiting included.
        threads: torch's threads during a step.
        log: told one line for each request, never its text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        MissingFeature: the extra `serve` is not installed.
        UserError: the address is taken or open to others, or keys and values do not fit into memory.
        RecipeError: a number outside its range, or a blank key.
    """
    try:
        from starlette.middleware.cors import CORSMiddleware

        from tawny.serving.answers import Service
        from tawny.serving.app import make_app
        from tawny.serving.guard import Guard, is_loopback
        from tawny.serving.web import Web
    except ModuleNotFoundError as error:
        raise MissingFeature(f"serving needs {error.name!r}: pip install 'tawny[serve]'") from None

    for key, value, least, most in (
        ("max_sequences", max_sequences, 1, _MOST_SEQUENCES),
        ("queue", queue, 0, _MOST_QUEUE),
        ("context", context, 2, sys.maxsize),
    ):
        if value is not None and not least <= value <= most:
            raise RecipeError(f"{key} {value} is not possible; give {least} to {most}")
    if not timeout > 0:
        raise RecipeError(f"timeout {timeout} is not possible; give more than 0 seconds")
    api_key = api_key and api_key.strip()  # no header could carry the line end of a file
    if api_key == "":
        raise RecipeError("api_key is blank; give one that nobody guesses, or leave it out")
    if not is_loopback(host) and api_key is None and not allow_open:
        raise UserError(
            f"everybody who reaches {host} could use the server; give --api-key, or --allow-open if that is wanted"
        )
    listening = _listen(host, port)
    try:
        with opening.threads(threads):
            named = name or _name_of(model)
            if not isinstance(model, nn.Module):
                model = resolve(model, progress.say)
                tokenizer = tokenizer or load_tokenizer(model)
            if tokenizer is None:
                raise UserError("a live model needs tokenizer=… to be served")
            opened = opening.open_model(model).model
            opening.check_predicts(opened)
            wanted = context or _CONTEXT
            capacity = min(wanted, longest_text(opened) or wanted)
            if context is not None and capacity < context:
                progress.say(f"a context of {context} tokens is more than the model has; it is {capacity}")
        worker = Worker(
            opened, tokenizer, capacity=capacity, count=max_sequences, queue=queue, threads=threads
        )
        app = make_app(Service(opened, tokenizer, named, capacity, max_sequences + queue), worker, timeout)
    except BaseException:
        listening.close()
        raise
    guarded: Any = Guard(app, host=host, key=api_key, log=log or (lambda _: None))
    # Pages of other sites may ask, if they know the key. Browsers ask for leave without it, so this stands before the guard.
    if api_key is not None:
        guarded = CORSMiddleware(guarded, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    return Server(Web(guarded, worker.end), worker, listening, host, named)


def _name_of(model: str | Path | nn.Module) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    path = Path(model).expanduser()
    if not path.exists():
        return str(model)
    return path.resolve().name if path.is_dir() else path.stem


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before a model is opened, so that a taken port costs nobody minutes."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{host} port {port} cannot be listened at: {first_line(error)}; give another --port"
        ) from None
    return listening
