"""Build the programs of llama.cpp that benchmarks/llama_tools.py runs, once, in build/llama/bin.

    python scripts/llama.py

The source is the one in the package llama-cpp-python, whose wheels have none of the programs. About ten minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-python>=0.3.36,<0.4"
FOLDER = Path(__file__).parents[1] / "build" / "llama"
PROGRAMS = [FOLDER / "bin" / f"llama-{name}" for name in ("quantize", "imatrix", "perplexity", "bench")]
# For this CPU, each in one file, and without what they do not use.
SETTINGS = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON"]
SETTINGS += [f"{name}=OFF" for name in ("BUILD_SHARED_LIBS", "LLAMA_CURL", "LLAMA_OPENSSL")]
SETTINGS += [f"LLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")]


def main() -> None:
    if not all(program.exists() for program in PROGRAMS):
        build()
    print("\n".join(map(str, PROGRAMS)))


def build() -> None:
    if missing := [name for name in ("cmake", os.environ.get("CXX", "c++")) if shutil.which(name) is None]:
        raise SystemExit(f"building llama.cpp needs {' and '.join(missing)}, which this machine lacks")
    source = FOLDER / "source"
    if not source.exists():
        unpack(source)
    settings = [f"-D{setting}" for setting in SETTINGS]
    subprocess.run(["cmake", "-S", source, "-B", FOLDER, *settings], check=True)
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    targets = [program.name for program in PROGRAMS]
    subprocess.run(["cmake", "--build", FOLDER, "--target", *targets], check=True)


def unpack(source: Path) -> None:
    """llama.cpp's own tree from the source distribution of the package."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as unfinished:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", "llama-cpp-python", "--dest", unfinished, PACKAGE], check=True)
        (archive,) = Path(unfinished).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(unfinished, filter="data")
        (tree,) = Path(unfinished).glob("*/vendor/llama.cpp")
        tree.rename(source)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
