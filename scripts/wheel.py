"""Build a wheel, install it into a new environment outside the checkout, and prune a tiny model with it.

python scripts/wheel.py                   borrows the installed dependencies, so that nothing large is fetched
python scripts/wheel.py --dependencies    installs them from the package index as a user would

The wheel is left in dist/. A file that the package forgets to ship, or a kernel that was not compiled, fails here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TINY = """
from transformers import LlamaConfig, LlamaForCausalLM
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2)).save_pretrained("tiny")
import tawny
print(tawny.__file__)
"""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def main() -> None:
    wheel = build()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        install(wheel, place / "env", borrow="--dependencies" not in sys.argv)
        use(place, pure=wheel.name.endswith("-none-any.whl"))
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size:,} bytes, installed and used")


def build() -> Path:
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", str(DIST), str(ROOT)], check=True)
    (wheel,) = DIST.glob("tawny-*.whl")
    return wheel


def install(wheel: Path, env: Path, borrow: bool) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    if borrow:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        # Files named *.pth are read in the environment's own folder alone: an editable Tawny stays out of it.
        known = [
            sysconfig.get_path("purelib"),
            *(path for path in sys.path if path.endswith("site-packages")),
        ]
        (env / "lib" / version / "site-packages" / "borrowed.pth").write_text("\n".join(dict.fromkeys(known)))
    subprocess.run(
        [*PIP, "--python", str(python), "install", *(["--no-deps"] if borrow else []), str(wheel)], check=True
    )


def use(place: Path, pure: bool) -> None:
    """Look at the kernels, prune, and count the zeros, as a user outside the checkout would."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

    def run(*command: str) -> str:
        program = [str(place / "env" / "bin" / command[0]), *command[1:]]
        return subprocess.run(
            program, cwd=place, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    home = run("python", "-c", TINY).splitlines()[-1]
    if not Path(home).is_relative_to(place):
        sys.exit(f"tawny was imported from {home}, which is not the new environment")
    kernels = json.loads(run("tawny", "doctor", "--json"))["kernels"]
    print(f"kernels: {kernels}")
    if not pure and kernels["missing_because"]:
        sys.exit("the wheel is for this platform, and its kernels cannot be used")
    run("tawny", "prune", "tiny", "--out", "pruned", "-s", "0.5", "-a", "uniform", "-m", "magnitude")
    run("tawny", "pack", "pruned", "--out", "packed", "--values", "bf16")
    for name in ("pruned", "packed"):
        sparsity = json.loads(run("tawny", "inspect", name, "--json"))["sparsity"]
        if sparsity != 0.5:
            sys.exit(f"the {name} model has sparsity {sparsity}, expected 0.5")


if __name__ == "__main__":
    main()
