"""A script in several processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(
    script: str, folder: Path, processes: int, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run a script, left in `folder` as run.py; one process is started without torchrun."""
    path = folder / "run.py"
    path.write_text(f"import torch\ntorch.set_num_threads(1)\n{script}\n")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    python_path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    return subprocess.run(
        [*command, str(path), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
