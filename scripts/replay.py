"""Run the same jobs through a commit and through the working tree, and compare what they write, byte by byte.

    python scripts/replay.py BASE [--only GLOB] [--accept GLOB]        (or: make replay BASE=…)

A refactor must not change a number. BASE and the working tree are installed side by side, each built as a wheel in an
environment of its own that borrows the dependencies of this one. A job is a `tawny` command line of replay_jobs.txt. Both
sides run it with the same relative paths, files and threads. What is compared:

- Every file: weights, packed folders, configs, allocations. Cards, pages and pictures are exempt (`WORDING`).
- Every value of the records (`RECORDS`) and of what `--json` prints. What a clock, this machine or a sentence says
  is exempt (`EXEMPT`). A key that one side lacks is the same as an empty one. The exit code is a value, too.

A job NAME~N is the job NAME over again, but killed once N files have got their names, and repeated and killed after 2 N, 3 N …
of them, until there is a result: on both sides it must also write what the uninterrupted job wrote.

One line is printed for a job, and below it each difference: the file and the key or tensor. The exit code is 1 if
anything differs or fails. What the jobs wrote stays in build/replay until the next run.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
JOBS = Path(__file__).with_name("replay_jobs.txt")
WORK = ROOT / "build" / "replay"
INPUTS = WORK / "inputs"
TOOLS = WORK / "tools"
MOST = 12  # differences of a job that are printed
RECORDS = ("run.json", "recover.json", "fit.json", "slim.json", "allocation.json")
WORDING = (".md", ".html", ".svg", ".png")
EXEMPT = re.compile(
    r"(.*_)?seconds|.*per_second|date|machine|versions|(.*_)?memory(_.*)?|(resident|peak)_bytes|resumed|warnings|says"
)
AGAIN = re.compile(r".*: teacher_(tokens|bytes): .*")  # counts what a killed job has to do again
SOLVERS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
ALLOCATORS = ("uniform", "er", "er-plus", "global", "owl", "dlp", "alpha", "atp", "lsa", "blend")
SETTINGS = {  # Both sides run at once, so their threads must not spin while they wait.
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
    "TAWNY_CACHE": "cache",
}
# A side imports the libraries once and forks for every job: each has a process of its own, and none waits for imports.
SIDE = """
import json, os, signal, sys, time
import matplotlib.backends.backend_svg, matplotlib.pyplot, rich.table, torch, tawny
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.llama import modeling_llama
from tawny.cli import main
get_checkpoint_conversion_mapping("llama")  # kept from then on
for name in tawny.__all__:
    getattr(tawny, name)

rename = os.replace

def killing(files, out):
    def replace(old, new, **options):
        nonlocal files
        rename(old, new, **options)
        if not os.path.exists(out):
            files -= 1
            if not files:
                os.kill(os.getpid(), signal.SIGKILL)
    return replace

for line in sys.stdin:
    name, words, files = json.loads(line)
    start, code, kills = time.perf_counter(), -signal.SIGKILL, -1
    while code == -signal.SIGKILL and kills < 50:
        kills += 1
        child = os.fork()
        if not child:
            for number, ending in ((1, "json"), (2, "err")):
                os.dup2(os.open(f"{name}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            if files:
                os.replace = killing(files * (kills + 1), words[words.index("--out") + 1])
            sys.argv = ["tawny", *words]
            main()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, time.perf_counter() - start, kills]), flush=True)
"""


def jobs(only: str) -> dict[str, list[str]]:
    """The words of each job by its name: those whose names match `only`, and those whose folders they read."""
    lines = []
    for line in JOBS.read_text(encoding="utf-8").splitlines():
        alike = [line.replace("{SOLVER}", name) for name in SOLVERS] if "{SOLVER}" in line else [line]
        for each in alike:
            lines += (
                [each.replace("{ALLOCATOR}", name) for name in ALLOCATORS]
                if "{ALLOCATOR}" in each
                else [each]
            )
    shared: dict[str, str] = {}
    made: dict[str, list[str]] = {}
    for line in lines:
        name, _, rest = line.partition(" ")
        plain, killed, _ = name.partition("~")
        if killed:
            made[name] = [re.sub(rf"^{plain}\b", name, word) for word in made[plain]]
            continue
        rest = re.sub(r"\{(\w+)\}", lambda found: shared[found[1]], rest).strip()
        if name.isupper():
            shared[name] = rest
        elif rest and name != "#":
            made[name] = [re.sub("^@", name, word) for word in shlex.split(rest)]
    chosen = {name for name in made if fnmatchcase(name, only)}
    for name in reversed(made):
        if name in chosen:
            chosen.add(name.partition("~")[0])
            chosen.update(part for word in made[name][1:] for part in re.split("[=/]", word) if part in made)
    return {name: words for name, words in made.items() if name in chosen}


def make_inputs() -> None:
    """Tiny random models, a text, pictures and an allocation, for both sides."""
    sys.path.insert(0, str(ROOT))
    from tests.pictures import save_pictures, save_seeing
    from tests.tiny import tiny_model
    from tests.tokenizer import tiny_tokenizer

    shutil.rmtree(INPUTS, ignore_errors=True)
    INPUTS.mkdir(parents=True)
    wide = {"hidden_size": 128, "intermediate_size": 176, "num_hidden_layers": 4, "head_dim": 32}
    for family, changes in (("llama", wide), ("qwen2", {}), ("gpt2", {}), ("mixtral", {})):
        tiny_model(family, **changes).save_pretrained(INPUTS / family)
        tiny_tokenizer().save_pretrained(INPUTS / family)
    save_seeing(INPUTS / "vit")
    save_pictures(INPUTS / "pictures", 8)
    shutil.copy(ROOT / "LICENSE", INPUTS / "text.txt")
    wish = "'*': 0.6\nmodel.layers.1.*: 0.5\nmodel.layers.2.*: 0.7\n"
    (INPUTS / "allocation.yaml").write_text(wish, encoding="utf-8")


class Side:
    """One installation, and the folder in which its jobs run."""

    def __init__(self, name: str) -> None:
        self.folder = WORK / name
        self._environment = WORK / f"{name}-environment"
        self._python = self._environment / "bin" / "python"

    def install(self, tree: Path) -> None:
        """The tree's wheel into an environment that borrows what the wheel depends on."""
        if not self._python.exists():
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", self._environment], check=True)
        packages = Path(self._asked("import sysconfig; print(sysconfig.get_path('purelib'))"))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        if not TOOLS.exists():
            needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"][
                "requires"
            ]
            subprocess.run([*pip, "install", "--target", TOOLS, *needed, "cmake", "ninja"], check=True)
        borrowed = [*(path for path in sys.path if path.endswith("-packages")), str(TOOLS)]
        (packages / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
        # By force: an editable install of the same version may be among what is borrowed. Build tools that stay in one place
        # and a build folder of its own let the C++ library be compiled again only where it changed.
        build = [
            "--no-build-isolation",
            "--config-settings",
            f"build-dir={tree / 'build' / 'replay' / 'library'}",
        ]
        subprocess.run(
            [*pip, "--python", self._python, "install", "--no-deps", "--force-reinstall", *build, tree],
            check=True,
        )
        if not Path(found := self._asked("import tawny; print(tawny.__file__)")).is_relative_to(packages):
            sys.exit(f"{found} was imported, which is not what was installed into {packages}")

    def install_commit(self, commit: str) -> None:
        """The same for a commit's files; what the last run installed stays if it was the same commit."""
        tree, done = WORK / "tree", self._environment / "commit"
        if done.is_file() and done.read_text(encoding="utf-8") == commit:
            return
        done.unlink(missing_ok=True)
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir()
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
        self.install(tree)
        done.write_text(commit, encoding="utf-8")

    def start(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for path in INPUTS.iterdir():
            (self.folder / path.name).symlink_to(path)
        given = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TAWNY"))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(
            [self._python, "-c", SIDE], cwd=self.folder, env=given | SETTINGS, **pipes
        )

    def begin(self, name: str, words: list[str]) -> None:
        files = int(name.partition("~")[2] or 0)
        if any(word.startswith(f"{name}/") for word in words):
            (self.folder / name).mkdir()
        print(json.dumps([name, [*words, "--json"], files]), file=self._process.stdin, flush=True)

    def end(self) -> tuple[int, float, int]:
        """The exit code of the job that was begun, its seconds, and how often it was killed."""
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{self.folder.name}: tawny cannot be imported; the reason stands above")
        code, seconds, kills = json.loads(answer)
        return code, seconds, kills

    def _asked(self, program: str) -> str:
        done = subprocess.run(
            [self._python, "-c", program], check=True, stdout=subprocess.PIPE, text=True, cwd=WORK
        )
        return done.stdout.strip()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON document that is not exempt, by its dotted path. What is empty has no leaves."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            sentences = key == "notes" and isinstance(item, list)  # numbers in a record
            if not sentences and not EXEMPT.fullmatch(str(key)):
                yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, value


def text(file: Path, side: Path) -> str:
    """A file's text without the names that differ between the sides, and between a job and the same one killed."""
    return re.sub(r"~\d+", "", file.read_text(encoding="utf-8").replace(str(side), ""))


def values(file: Path, side: Path) -> dict[str, Any]:
    """What can be told apart in a file: a JSON document's values, or tensors by their bytes; nothing in others."""
    if file.suffix == ".json":
        document = text(file, side)
        return dict(leaves(json.loads(document))) if document else {}
    found: dict[str, Any] = {}
    if file.suffix == ".safetensors":
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            start = opened.tell()
            found = {"metadata": header.pop("__metadata__", None)}
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                opened.seek(start + first)
                found[name] = (entry["dtype"], entry["shape"], hash(opened.read(last - first)))
    return found


def outputs(side: Path, name: str) -> dict[str, Path]:
    """What a job of that name wrote: files by their paths in its folder, and what it printed, as `printed`."""
    folder = side / name
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {"printed": side / f"{name}.json", **files}


def differences(base: tuple[Path, str], here: tuple[Path, str]) -> Iterator[str]:
    """A line `FILE: KEY: OLD became NEW` for whatever is not the same after two jobs, each a side's folder and a name."""
    before, after = outputs(*base), outputs(*here)
    for file in sorted({*before, *after}):
        if file.endswith(WORDING):
            continue
        if not (file in before and file in after):
            yield f"{file}: only in {Path(*(base if file in before else here))}"
            continue
        record = file == "printed" or Path(file).name in RECORDS
        if not record and filecmp.cmp(before[file], after[file], shallow=False):
            continue
        if file.endswith(".yaml") and text(before[file], base[0]) == text(after[file], here[0]):
            continue
        old, new = values(before[file], base[0]), values(after[file], here[0])
        keys = [key for key in {**old, **new} if repr(old.get(key)) != repr(new.get(key))]
        for key in keys:
            became = f": {old.get(key)!r} became {new.get(key)!r}" if before[file].suffix == ".json" else ""
            yield f"{file}: {key}{became}"
        if not record and not keys:
            yield f"{file}: other bytes"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = options.add_argument
    add("base", metavar="BASE", help="the commit to compare the working tree with")
    add("--only", metavar="GLOB", default="*", help="jobs to run, and those whose folders they read")
    add(
        "--accept",
        metavar="GLOB",
        action="append",
        default=[],
        help="printed differences to ignore; repeatable",
    )
    given = options.parse_args()
    git = ["git", "-C", ROOT, "rev-parse", "--verify", f"{given.base}^{{commit}}"]
    commit = subprocess.run(git, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    make_inputs()
    before, after = Side("base"), Side("here")
    print(f"installing BASE ({commit[:12]}) and the working tree", flush=True)
    before.install_commit(commit)
    after.install(ROOT)
    before.start()
    after.start()
    every, same = jobs(given.only), 0
    for name, words in every.items():
        before.begin(name, words)
        after.begin(name, words)
        (old, past, kills), (new, now, again) = before.end(), after.end()
        found = [f"exit code {old} became {new}"] if old != new else []
        found += differences((before.folder, name), (after.folder, name))
        plain, killed, _ = name.partition("~")
        if killed:
            found += ["it ended before it could be killed"] * (not (kills and again))
            for side in (before.folder, after.folder):
                found += differences((side, plain), (side, name))
            found = [line for line in found if not AGAIN.fullmatch(line)]
        found = [line for line in found if not any(fnmatchcase(line, glob) for glob in given.accept)]
        if old and new:
            found.append(f"failed on both sides: {after.folder / name}.err says why")
        same += not found
        print(f"{name:24}{'differs' if found else 'same':8}{past:6.1f} s{now:7.1f} s", flush=True)
        for line in found[:MOST] + [f"and {len(found) - MOST} more"] * (len(found) > MOST):
            print(f"    {line}", flush=True)
    print(f"{same} of {len(every)} jobs gave the same")
    return int(same < len(every))


if __name__ == "__main__":
    sys.exit(main())
