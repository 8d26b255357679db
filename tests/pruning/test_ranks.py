"""Several processes on this machine against one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tawny.errors import UserError
from tawny.model.checkpoint import Checkpoint
from tawny.model.streams import Samples
from tawny.pruning.ranks import Ranks
from tests.tiny import tiny_model, tokens

SCRIPT = """
import os, signal, sys, torch
torch.set_num_threads(1)
import tawny
from tawny.pruning import journal
from tawny.cli.common import console_for
from tawny.progress import Silent
from tests.tiny import tokens
journal.SHARE = float("inf")
dense, out, solver, dying = sys.argv[1:5]

class Progress(Silent):
    def step(self, text):
        pass

if dying and os.environ.get("RANK") == "1":
    from tawny.pruning.block import LoadedBlock
    write = LoadedBlock.write
    def last(self):
        if self.index == int(dying):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self)
    LoadedBlock.write = last
with console_for(False):
    tawny.prune(dense, out, sparsity=0.6, allocator="owl", solver=solver, compute="float32",
                calibration=tokens(16, 512), progress=Progress())
"""


def launch(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The script in one process, or in several as torchrun starts them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(_port())]
    script = Path(str(arguments[0])).parent / "script.py"
    script.write_text(SCRIPT)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    )
    return subprocess.run(
        [*command, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def _port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return checkpoint.read(checkpoint.files)


@pytest.mark.parametrize(("processes", "solver"), [(2, "wanda"), (4, "sparsegpt")])
def test_several_processes_prune_as_one_does_and_the_same_each_time(dense, tmp_path, processes, solver):
    for out, count in (("one", 1), ("some", processes), ("again", processes)):
        done = launch(count, dense, tmp_path / out, solver, "")
        assert done.returncode == 0, done.stderr
    one, some = weights(tmp_path / "one"), weights(tmp_path / "some")
    assert all(torch.equal(one[key], some[key]) for key in one)  # the order of the sums does not matter
    for path in (tmp_path / "some").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    records = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("one", "some")]
    assert [x["name"] for x in records[0]["linears"]] == [x["name"] for x in records[1]["linears"]]
    assert records[0]["zeros"] == records[1]["zeros"]


def test_a_lost_process_ends_all_with_one_line_and_the_same_command_goes_on(dense, tmp_path):
    done = launch(2, dense, tmp_path / "out", "wanda", "1")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "a process of this run was lost" in lines[0], done.stderr
    assert "1 finished block are kept" in lines[0].replace("is kept", "are kept")
    assert (tmp_path / "out.partial" / "journal.json").is_file()
    resumed = launch(2, dense, tmp_path / "out", "wanda", "")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed"] == 1
    assert launch(2, dense, tmp_path / "whole", "wanda", "").returncode == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def ranks_of(size: int) -> list[Ranks]:
    made = [Ranks(alone=True) for _ in range(size)]
    for rank, one in enumerate(made):
        one.rank, one.size = rank, size
    return made


@pytest.mark.parametrize(("samples", "size"), [(9, 2), (8, 4), (5, 4), (4, 4)])
def test_samples_are_shared_without_gaps_and_evenly(samples, size):
    whole = Samples(tokens(samples, 8))
    parts = [one.part(whole).tokens for one in ranks_of(size)]
    assert torch.equal(torch.cat(parts), whole.tokens)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("samples", "size"), [(32, 2), (12, 3), (13, 3)])
def test_ranks_run_the_forwards_that_one_process_would(samples, size):
    """Chunks of four samples of 512 tokens stay whole."""
    whole = Samples(torch.zeros(samples, 512, dtype=torch.int64))
    shares = ranks_of(size)[0]._shares(samples, 512)
    assert [share.start % 4 for share in shares] == [0] * size
    assert [len(one.part(whole)) for one in ranks_of(size)] == [share.stop - share.start for share in shares]
    assert ranks_of(size)[0].largest_part(samples, 512) == max(len(one.part(whole)) for one in ranks_of(size))


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(UserError, match="3 samples cannot be shared by 4 processes"):
        ranks_of(4)[0].part(Samples(tokens(3, 8)))


def test_work_is_spread_by_what_it_costs():
    assert ranks_of(2)[0].owners([1, 1, 1, 3]) == [1, 1, 1, 0]
    assert ranks_of(2)[1].owners([1, 1, 1, 3]) == [1, 1, 1, 0]
    assert set(ranks_of(4)[0].owners([5.0] * 8)) == {0, 1, 2, 3}
