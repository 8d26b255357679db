"""`tawny serve`: a model behind the OpenAI protocol."""

from __future__ import annotations

import signal
import threading

import tawny
from tawny.cli.console import Console
from tawny.cli.options import RECIPE, Model, Threads, option
from tawny.cli.root import verb

_NETWORK = "Network"


@verb(
    "tawny serve packed",
    "tawny serve smollm2 --port 9000 --max-sequences 4 --context 2048",
    "tawny serve packed --host 0.0.0.0 --api-key $KEY",
    document=False,
)
def serve(
    model: Model,
    console: Console,
    host: str = option("--host HOST", "Address to listen on.", _NETWORK, default="127.0.0.1"),
    port: int = option(
        "--port N", "Port to listen on; 0 takes any free one.", _NETWORK, default=8000, min=0, max=65535
    ),
    api_key: str = option("--api-key KEY", "Key that clients must send.", _NETWORK, envvar="TAWNY_API_KEY"),
    allow_open: bool = option(
        "--allow-open", "Listen beyond this machine without a key.", _NETWORK, default=False
    ),
    max_sequences: int = option(
        "--max-sequences N", "Texts decoded at once.", RECIPE, default=8, min=1, max=1024
    ),
    context: int = option(
        "--context N", "Maximum tokens of prompt and text. Default: the model's, at most 4096.", RECIPE, min=2
    ),
    queue: int = option("--queue N", "Requests that may wait; others get 429.", RECIPE, default=64, min=0),
    timeout: float = option(
        "--timeout SECONDS", "Time that a request may take, waiting included.", RECIPE, default=600.0
    ),
    threads: Threads = None,
) -> None:
    """Serve MODEL over the OpenAI protocol, with a chat page at /. Ctrl-C ends it."""
    with console.progress() as progress:
        server = tawny.serve(
            model,
            host=host,
            port=port,
            api_key=api_key,
            allow_open=allow_open,
            max_sequences=max_sequences,
            context=context,
            queue=queue,
            timeout=timeout,
            threads=threads,
            log=console.note,
            progress=progress,
        )

    def ready() -> None:
        for line in server.described():
            console.note(line)

    if threading.current_thread() is threading.main_thread():
        # The server hands a signal on once it has ended; SIGTERM should end the program as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.run(ready)
    except KeyboardInterrupt:
        console.note("ended")
