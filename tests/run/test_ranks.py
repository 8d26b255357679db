"""Several processes on this machine against one."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tawny.errors import UserError
from tawny.model.checkpoint import Checkpoint
from tawny.model.streams import Samples
from tawny.run.ranks import Ranks
from tests.tiny import tiny_model, tokens
from tests.torchrun import torchrun

SCRIPT = """
import os, signal, sys
import tawny
from tawny.run import journal
from tawny.cli.common import console_for
from tawny.progress import Silent
from tests.tiny import tokens
journal.SHARE = float("inf")
dense, out, solver, dying = sys.argv[1:5]

if dying and os.environ.get("RANK") == "1":
    from tawny.pruning.visitors import Write
    write = Write.visit
    def last(self, block):
        if block.index == int(dying):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, block)
    Write.visit = last
with console_for(False):
    tawny.prune(dense, out, sparsity=0.6, allocator="owl", solver=solver, compute="float32",
                calibration=tokens(16, 512), progress=Silent())
"""


def launch(processes: int, dense: Path, *arguments: object, forks: bool = True) -> CompletedProcess[str]:
    return torchrun(SCRIPT, dense.parent, processes, dense, *arguments, forks=forks)


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "dense"
    )  # narrower than the forwards
    return tmp_path / "dense"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return checkpoint.read(checkpoint.files)


def same_files(folder: Path, other: Path) -> None:
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.mark.parametrize(
    ("processes", "solver"), [(2, "sparsegpt"), pytest.param(4, "wanda", marks=pytest.mark.slow)]
)
def test_several_processes_prune_as_one_does_and_the_same_each_time(dense, tmp_path, processes, solver):
    for out, count in (("one", 1), ("some", processes), ("again", processes)):
        done = launch(count, dense, tmp_path / out, solver, "")
        assert done.returncode == 0, done.stderr
    one, some = weights(tmp_path / "one"), weights(tmp_path / "some")
    assert all(torch.equal(one[key], some[key]) for key in one)  # the order of the sums does not matter
    same_files(tmp_path / "some", tmp_path / "again")
    records = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("one", "some")]
    assert [x["name"] for x in records[0]["linears"]] == [x["name"] for x in records[1]["linears"]]
    assert records[0]["zeros"] == records[1]["zeros"]


def test_a_lost_process_ends_all_with_one_line_and_the_same_command_goes_on(dense, tmp_path):
    done = launch(2, dense, tmp_path / "out", "wanda", "1", forks=False)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "a process of this run was lost" in lines[0], done.stderr
    assert "1 finished block are kept" in lines[0].replace("is kept", "are kept")
    assert (tmp_path / "out.partial" / "journal.json").is_file()
    resumed = launch(2, dense, tmp_path / "out", "wanda", "")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed"] == 1
    assert launch(2, dense, tmp_path / "whole", "wanda", "").returncode == 0
    same_files(tmp_path / "whole", tmp_path / "out")


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


def test_what_the_first_process_does_once_waits_for_those_that_are_late(tmp_path):
    late = (
        "import os, shutil, time\nfrom pathlib import Path\nfrom tawny.process_group import ProcessGroup\n"
        f"shared = Path({str(tmp_path)!r}) / 'shared'\n"
        "with ProcessGroup() as processes:\n"
        "    processes.once(shared.mkdir)\n"
        "    time.sleep(processes.rank)\n"
        "    assert shared.exists()\n"
        "    processes.once(lambda: shutil.rmtree(shared))\n"
        "    assert not shared.exists()"
    )
    done = torchrun(late, tmp_path, 2)
    assert done.returncode == 0, done.stderr
