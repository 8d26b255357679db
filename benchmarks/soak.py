"""A server among 64 clients that behave badly, and some that do not: nothing crashes, grows, or is mixed up.

    python benchmarks/soak.py                 # ten minutes
    python benchmarks/soak.py --minutes 1 --results FILE

The server is a process of its own on a free loopback port, with a tiny model. Most clients send what they should not:
malformed JSON, invalid UTF-8, huge bodies, slow bodies, prompts of 100,000 tokens, unknown fields; or they leave in the
middle of a stream. One in four is well-behaved: it asks for greedy texts whose answers were taken beforehand, while nobody
else asked, and every one of its answers must be the same. 429 is an answer, after which it comes back.

A line in the log that nobody expects is a failure. asyncio says by itself that it could not send to a client that had left.

Memory is read after a first minute (or a tenth of the time), which fills caches, and at the end, when all have left.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import ROOT, keep, parser_of

CLIENTS, WELL_BEHAVED = 64, 16
PROMPTS = [f"Text number {number}, and " + "so on " * (7 * number % 90) for number in range(24)]


def make_model(folder: Path) -> None:
    """The tiny model of the tests, as files."""
    sys.path.insert(0, str(ROOT))
    from tests.serving.tiny import byte_tokenizer, served_model

    served_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def resident(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


async def send(port: int, body: bytes, *, pause: float = 0.0, length: int | None = None) -> Any:
    """Open a connection and send a request; `pause` seconds in the middle of its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body[: len(body) // 2])
    if pause:
        await writer.drain()
        await asyncio.sleep(pause)
    writer.write(body[len(body) // 2 :])
    await writer.drain()
    return reader, writer


async def exchange(port: int, body: bytes, **more: Any) -> tuple[int, bytes]:
    """Status and body of the answer; status 0 where the server closed the connection without one."""
    writer = None
    try:
        reader, writer = await send(port, body, **more)
        whole = await asyncio.wait_for(reader.read(), 120)
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0, b""
    finally:
        if writer is not None:
            writer.close()
    head, _, rest = whole.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), rest


def asked(prompt: Any, tokens: int = 24, **more: Any) -> bytes:
    return json.dumps(
        {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}
    ).encode()


async def good(port: int, number: int, expected: list[str], seen: collections.Counter[str]) -> None:
    status, body = await exchange(port, asked(PROMPTS[number]))
    if status == 429:
        seen["well-behaved: come back later"] += 1
        await asyncio.sleep(0.2)
    elif status == 200 and json.loads(body)["choices"][0]["text"] == expected[number]:
        seen["well-behaved: right"] += 1
    else:
        seen[f"well-behaved: WRONG ({status})"] += 1
        print(f"wrong: {status} {body[:300]!r}, expected {expected[number]!r}", file=sys.stderr)


async def leave(port: int, chance: random.Random) -> str:
    """Go away in the middle of a stream."""
    _, writer = await send(port, asked("Go on", chance.randrange(50, 900), stream=True))
    await asyncio.sleep(chance.random() * 0.5)
    writer.close()
    return "left"


async def bad(port: int, chance: random.Random, seen: collections.Counter[str]) -> None:
    kind = chance.choice(
        [
            "leaves",
            "leaves",
            "random",
            "random",
            "broken",
            "utf-8",
            "huge",
            "slow",
            "short",
            "long",
            "unknown",
        ]
    )
    try:
        match kind:
            case "leaves":
                told: Any = await leave(port, chance)
            case "random":
                text = "".join(chance.choices("owl é猫\n", k=chance.randrange(1, 900)))
                told = (await exchange(port, asked(text, chance.randrange(1, 200), temperature=1)))[0]
            case "broken":
                told = (await exchange(port, asked("owl")[: chance.randrange(1, 40)]))[0]
            case "utf-8":
                told = (await exchange(port, b'{"model": "model", "prompt": "\xff\xfe"}'))[0]
            case "huge":
                told = (await exchange(port, b" " * (17 << 20)))[0]
            case "slow":
                told = (await exchange(port, asked("owl"), pause=chance.random() * 3))[0]
            case "short":  # promises more than it sends, and goes
                _, writer = await send(port, asked("owl"), length=10_000)
                await asyncio.sleep(0.2)
                writer.close()
                told = "left"
            case "long":
                told = (await exchange(port, asked([chance.randrange(256) for _ in range(100_000)])))[0]
            case _:
                told = (await exchange(port, asked("owl", store=True)))[0]
    except OSError as error:
        told = type(error).__name__
    seen[f"{kind}: {told}"] += 1


async def soak(port: int, process: int, minutes: float) -> dict[str, Any]:
    expected = []
    for prompt in PROMPTS:
        status, body = await exchange(port, asked(prompt))
        assert status == 200, body
        expected.append(json.loads(body)["choices"][0]["text"])
    seen: collections.Counter[str] = collections.Counter()
    begin = time.monotonic()
    settled = begin + min(60.0, 6 * minutes)
    end = begin + 60 * minutes

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            if number < WELL_BEHAVED:
                await good(port, chance.randrange(len(PROMPTS)), expected, seen)
            else:
                await bad(port, chance, seen)

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    await asyncio.sleep(settled - time.monotonic())
    before = resident(process)
    await asyncio.gather(*clients)
    for number in range(len(PROMPTS)):  # still the same answers, and nobody left behind
        while (status := (await exchange(port, asked("owl", 1)))[0]) == 429:
            await asyncio.sleep(0.2)
        assert status == 200
        await good(port, number, expected, seen)
    after = resident(process)
    return {
        "minutes": minutes,
        "clients": CLIENTS,
        "resident_before": before,
        "resident_after": after,
        "growth": round(after / before - 1, 4),
        "seen": dict(sorted(seen.items())),
    }


def main() -> int:
    parser = parser_of(__doc__, "soak.json")
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tawny-soak-") as temporary:
        folder = Path(temporary) / "model"
        make_model(folder)
        log = Path(temporary) / "log"
        command = [sys.executable, "-m", "tawny", "serve", str(folder), "--port", "0", "--threads", "1"]
        with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
            try:
                while " at http://" not in (said := log.read_text()):
                    assert process.poll() is None, said
                    time.sleep(0.1)
                port = int(said.split("http://127.0.0.1:")[1].split()[0])
                made = asyncio.run(soak(port, process.pid, options.minutes))
                assert process.poll() is None, "the server has ended"
            finally:
                process.terminate()
                made_in = time.monotonic()
                process.wait(60)
            made["seconds_to_end"] = round(time.monotonic() - made_in, 2)
        lines = log.read_text().splitlines()
        made["unexpected_log_lines"] = [
            line
            for line in lines[3:]
            if not line.startswith(("POST ", "GET ", "ended", "socket.send() raised exception."))
        ][:20]
    keep(options.results, made)
    print(json.dumps(made, indent=1))
    wrong = (
        any("WRONG" in key for key in made["seen"]) or made["growth"] > 0.05 or made["unexpected_log_lines"]
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
