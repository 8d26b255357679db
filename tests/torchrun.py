"""A script in several processes, as torchrun starts them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

# Imports take longer than the tests' models. So one process imports once, and the ranks of every script are forks of it.
# The store is the parent's, as torchrun's is; the first rank that fails ends the others.
_FORKS = """
import json, os, runpy, signal, socket, sys
import tawny.pruning.run, tawny.recovery.run, tests.tiny, transformers.models.llama.modeling_llama
from torch.distributed import TCPStore
for line in sys.stdin:
    size, script, *arguments = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = set()
    for rank in range(size):
        if pid := os.fork():
            ranks.add(pid)
            continue
        for number, name in enumerate((os.devnull, script + ".stdout", script + ".stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
        if size > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    store = TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    del store
    print(failed, flush=True)
"""


def torchrun(
    script: str, folder: Path, processes: int, *arguments: object, forks: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script, left in `folder` as run.py, as so many ranks; without `forks`, torchrun itself starts them."""
    path = folder / "run.py"
    path.write_text(f"import torch\ntorch.set_num_threads(1)\n{script}\n")
    command = [str(path), *map(str, arguments)]
    if not forks:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.run(
            [sys.executable, *launcher, *command], env=_environment(), capture_output=True, text=True
        )
    said = [path.with_name(f"run.py.{name}") for name in ("stdout", "stderr")]
    for file in said:
        file.write_text("")
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([processes, *command]) + "\n")
    server.stdin.flush()
    failed = int(server.stdout.readline())
    done = subprocess.CompletedProcess(command, failed, *(file.read_text() for file in said))
    for file in said:
        file.unlink()
    return done


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, whose end of its input closes."""
    return subprocess.Popen(
        [sys.executable, "-c", _FORKS],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _environment() -> dict[str, str]:
    python_path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
