"""Which models Tawny prunes, packs and decodes: every family with a causal language model in transformers, measured.

    python benchmarks/families.py                       # all of them, in some minutes
    python benchmarks/families.py --only llama gpt2     # some, only printed; with --json PATH put into that file

A family is a model type of transformers' MODEL_FOR_CAUSAL_LM_MAPPING_NAMES. Of each a tiny random model in float32 is made
(hidden size 32, a few blocks, 256 tokens), saved, and taken through three steps, each of which is checked:

- pruned: `tawny.prune` to 50 % with OWL and SparseGPT, or by magnitude where that is refused. ok: every linear has the zeros
  that the run records, that many are the target (within one weight a linear), nothing else has changed, and plain
  transformers opens the folder with finite logits.
- packed: `tawny.pack` in float32 and `tawny.load`. ok: logits are those of the pruned model within rounding, the packed share
  of the prunable weights is known, and `tawny.unpack` gives the same bytes.
- decoded: `tawny.generate` of the packed model and of the dense one. ok: its tokens are those of greedy choices from whole
  forwards of the pruned model without any cache.

How far rounding may move logits is measured: every weight of the dense model is moved by one unit of rounding, up or down at
random, which does to each product about what another order of its sums does. The packed model may be `TOLERANCE` times as far
away as that. A model whose logits depend on later tokens is no decoder: it is told by its logits, and is not decoded.

Each family runs in a process of its own with a time and a memory limit. What Tawny refuses is recorded with its message; an
exception that is not Tawny's own is an error, with the exception's first line.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import re
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from families_tiny import NotTried, logits_of, said, tiny_model, tokens
from harness import RESULTS, keep, parser_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tawny
from tawny.errors import TawnyError, first_line
from tawny.model.linears import Linear, linears_of
from tawny.model.structure import find_stack
from tawny.packed.linear import PackedLinear

SPARSITY = 0.5
TOLERANCE = 10.0
GENERATED = 24  # tokens

# --- the steps -------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A result that is not what it should be."""


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def linears_in(model: Any) -> list[Linear]:
    path, blocks = find_stack(model)
    return [linear for index, block in enumerate(blocks) for linear in linears_of(block, f"{path}.{index}")]


def looks_back_only(model: Any) -> bool:
    """Whether no token's logits depend on later tokens."""
    ids = tokens(1, 24, 2)
    whole, half = logits_of(model, ids)[:, :12], logits_of(model, ids[:, :12])
    return bool((whole - half).norm() <= 1e-3 * whole.norm())


def prune(source: Path, out: Path) -> dict[str, Any]:
    """Prune as most would; by magnitude where that is refused."""
    ids = tokens(8, 32, 0)
    try:
        keys = {"allocator": "owl", "solver": "sparsegpt"}
        record = tawny.prune(source, out, sparsity=SPARSITY, calibration=ids, **keys)
    except TawnyError as error:
        refused = first_line(error)
        try:
            keys = {"allocator": "uniform", "solver": "magnitude"}
            record = tawny.prune(source, out, sparsity=SPARSITY, calibration=ids, overwrite=True, **keys)
        except TawnyError:
            raise error from None
        keys["refused"] = refused
    _check_pruned(record, source, out)
    return {**keys, "sparsity": record.sparsity, "prunable": record.prunable}


def _check_pruned(record: tawny.Record, source: Path, out: Path) -> None:
    model, before = opened(out), dict(opened(source).named_parameters())
    linears = linears_in(model)
    if abs(record.zeros - SPARSITY * record.prunable) > len(record.linears):
        raise Wrong(f"{record.zeros:,} of {record.prunable:,} weights are recorded as zeros")
    if {linear.name for linear in linears} != {linear.name for linear in record.linears}:
        raise Wrong(f"{len(record.linears)} linears are recorded, and {len(linears)} are there")
    weights = {linear.name: linear.view(getattr(linear.module, linear.parameter)) for linear in linears}
    for each in record.linears:
        zeros = int((weights[each.name] == 0).sum())
        if zeros != each.zeros or abs(zeros - each.target * weights[each.name].numel()) > 1:
            raise Wrong(f"{each.name} has {zeros:,} zeros; {each.zeros:,} recorded, target {each.target}")
    pruned = {linear.key for linear in linears}
    for name, value in model.named_parameters():
        if name not in pruned and not torch.equal(value, before[name]):
            raise Wrong(f"{name}, which is not pruned, has changed")
    if not bool(logits_of(model, tokens(2, 16, 0)).isfinite().all()):
        raise Wrong("the pruned model gives NaN")


def pack(dense: Path, out: Path, again: Path) -> dict[str, Any]:
    report = tawny.pack(dense, out, "f32")
    model, packed = opened(dense), tawny.load(out)
    distance = max(_in_roundings(model, packed, ids) for ids in (tokens(2, 24, 1), tokens(1, 1, 1)))
    if not distance <= TOLERANCE:
        raise Wrong(f"logits are {distance:.3g} times as far away as rounding moves them")
    tawny.unpack(out, again)
    if _bytes_of(again) != _bytes_of(dense):
        raise Wrong("unpacking gives other bytes")
    held = [m.shape for m in packed.modules() if isinstance(m, PackedLinear)]
    share = sum(rows * columns for rows, columns in held) / sum(x.numel for x in linears_in(model))
    return {"share": share, "distance_in_roundings": distance, "untouched": report.untouched}


def _in_roundings(model: Any, packed: Any, ids: Tensor) -> float:
    """How far the packed model's logits are, in units of how far rounding moves the dense ones: the most of three draws.

    One token goes through the packed kernel, many through a product with the weights unpacked.
    """
    expected = logits_of(model, ids)
    generator, moved = torch.Generator().manual_seed(0), []
    for _ in range(3):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator).mul_(2).sub_(1)
                parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
        moved.append(float((logits_of(twin, ids) - expected).norm()))
    return float((logits_of(packed, ids) - expected).norm()) / max(moved)


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def decode(dense: Path, packed: Path | None) -> dict[str, Any]:
    prompt = tokens(1, 12, 3)
    made = {"dense": tawny.generate(opened(dense), prompt, max_tokens=GENERATED)}
    if packed is not None:
        made["packed"] = tawny.generate(tawny.load(packed), prompt, max_tokens=GENERATED)
    expected = by_whole_forwards(opened(dense), prompt)
    for name, text in made.items():
        if text.tokens != expected:
            pairs = zip(text.tokens, expected, strict=False)
            same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(text.tokens))
            raise Wrong(f"{name}, path {text.path}: {same} of {GENERATED} tokens are those of whole forwards")
    return {"paths": {name: text.path for name, text in made.items()}}


def by_whole_forwards(model: Any, prompt: Tensor) -> list[int]:
    """The likeliest tokens, each from a forward over all before it."""
    read = prompt
    for _ in range(GENERATED):
        read = torch.cat([read, logits_of(model, read)[:, -1:].argmax(-1)], 1)
    return [int(token) for token in read[0, prompt.shape[1] :]]


def decoded_by_transformers(dense: Path) -> str:
    """Whether transformers' own generation with a cache gives the tokens of whole forwards; else the fault is not Tawny's."""
    model, prompt = opened(dense), tokens(1, 12, 3)
    try:
        made = model.generate(prompt, max_new_tokens=GENERATED, do_sample=False)[0, prompt.shape[1] :]
        return "the same" if made.tolist() == by_whole_forwards(model, prompt) else "others"
    except Exception as error:
        return said(error)


# --- one family ------------------------------------------------------------------------------------------------------


def measure(family: str, scratch: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """All steps of one family; what is known is told after each."""
    made: dict[str, Any] = {}

    def step(name: str, work: Callable[[], dict[str, Any]]) -> bool:
        tell({**made, name: {"outcome": "stopped"}})  # what is left if the process ends here
        try:
            made[name] = {"outcome": "ok", **work()}
        except NotTried as error:
            made[name] = {"outcome": "not tried", "reason": str(error)}
        except TawnyError as error:
            made[name] = {"outcome": "refused", "reason": first_line(error)}
        except Wrong as error:
            made[name] = {"outcome": "wrong", "reason": str(error)}
        except Exception as error:
            made[name] = {"outcome": "error", "reason": said(error), "where": _where(error)}
        tell(made)
        return bool(made[name]["outcome"] == "ok")

    dense, pruned, packed = scratch / "dense", scratch / "pruned", scratch / "packed"

    def built() -> dict[str, Any]:
        model = tiny_model(family)
        made["causal"] = looks_back_only(model)
        try:
            model.save_pretrained(dense)
            opened(dense)
        except Exception as error:
            raise NotTried(f"transformers cannot open what it saved: {said(error)}") from error
        return {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}

    def counted() -> dict[str, Any]:
        return _contents(opened(dense))

    if not step("built", built):
        return
    step("found", counted)
    if not step("pruned", lambda: prune(dense, pruned)):
        return
    is_packed = step("packed", lambda: pack(pruned, packed, scratch / "again"))
    if made["causal"] and not step("decoded", lambda: decode(pruned, packed if is_packed else None)):
        made["decoded"]["transformers"] = decoded_by_transformers(pruned)
        tell(made)


def _contents(model: Any) -> dict[str, Any]:
    """Where the blocks are, how many linears and experts are prunable, and which other matrices there are."""
    path, blocks = find_stack(model)
    linears = linears_in(model)
    pruned = {linear.key for linear in linears}
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    head = model.get_output_embeddings()
    ends = embeddings | ({id(p) for p in head.parameters()} if head is not None else set())
    others: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name not in pruned and parameter.dim() >= 2 and id(parameter) not in ends:
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            others[pattern] = others.get(pattern, 0) + parameter.numel()
    return {
        "blocks": {"path": path, "count": len(blocks)},
        "linears": sum(linear.expert is None for linear in linears),
        "experts": sum(linear.expert is not None for linear in linears),
        "prunable": sum(linear.numel for linear in linears),
        "not_pruned": others,
    }


def _where(error: BaseException) -> list[str]:
    """The last places in Tawny and below it."""
    frames = [
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    return frames[-6:]


def _limited(family: str, scratch: Path, gigabytes: float, pipe: Any) -> None:
    """The child's work."""
    warnings.filterwarnings("ignore")
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    most = pages * resource.getpagesize() + int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    measure(family, scratch, pipe.send)
    pipe.close()


def run(family: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    """One family in a process of its own."""
    context, start = multiprocessing.get_context("fork"), time.perf_counter()
    scratch = Path(tempfile.mkdtemp(prefix="tawny-family-"))
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_limited, args=(family, scratch, gigabytes, theirs))
    made: dict[str, Any] = {}
    why = "the process ended"
    try:
        child.start()
        theirs.close()
        while True:
            left = seconds - (time.perf_counter() - start)
            if left <= 0 or not ours.poll(left):
                why = f"not done after {seconds:g} s"
                break
            made = ours.recv()
    except EOFError:
        pass
    finally:
        if why.startswith("not"):
            child.kill()
        child.join()
        shutil.rmtree(scratch, ignore_errors=True)
    for step in made.values():
        if isinstance(step, dict) and step["outcome"] == "stopped":
            step["reason"] = f"{why} (exit code {child.exitcode})"
    return {**made, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families")
    parser.add_argument(
        "--json", type=Path, default=None, help="results file; with --only, families in it are kept"
    )
    parser.add_argument("--seconds", type=float, default=60, help="most for one family")
    parser.add_argument("--memory", type=float, default=6, help="most for one family, GB of address space")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    every = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if unknown := set(args.only or ()) - set(every):
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    # What all need is imported once, before the first of them is a process of its own.
    with tempfile.TemporaryDirectory() as scratch:
        measure("llama", Path(scratch), lambda _: None)
    path = args.json or (None if args.only else RESULTS / "families.json")
    families: dict[str, Any] = {}
    if args.only and path is not None and path.exists():
        families = json.loads(path.read_text(encoding="utf-8"))["families"]
    for name in args.only or every:
        families[name] = made = run(name, args.seconds, args.memory)
        steps = {step: told for step, told in made.items() if isinstance(told, dict)}
        said = "; ".join(f"{step}: {_short(told)}" for step, told in steps.items())
        print(f"{name} ({made['seconds']:.1f} s): {said}", flush=True)
        if path is not None:
            whole = {"sparsity": SPARSITY, "tolerance": TOLERANCE, "families": dict(sorted(families.items()))}
            keep(path, whole)


def _short(told: Mapping[str, Any]) -> str:
    return f"{told['outcome']}{' (' + told['reason'] + ')' if 'reason' in told else ''}"


if __name__ == "__main__":
    main()
