"""How far a model's features have moved from those of its dense one, on texts or pictures.

Models that predict no next token (text encoders, vision transformers) have no perplexity. Their output is compared instead:

- `error`: Σ‖f − g‖² / Σ‖g‖² over all positions, g of the dense model: the share of the output's energy that is lost.
- `cosine`: of f and g, mean over a sample's positions.
- `neighbours`: how often the nearest of all other samples is the same in both, by the cosine of mean-pooled features: what
  a search by embeddings notices.
- `kl`, `top1`, `top5` of models with logits: classifiers one a sample, masked language models one a token. KL(dense ‖ model)
  is in nats; `top5` says how often the dense model's first is among the model's first five.

All but `error` are means over samples, however many tokens each has.

Both models see the same samples and are walked block by block, one after the other. Sums are taken in float32 and added up in
float64. ± is sd over samples / √samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.calibration.inputs import read_inputs
from tawny.calibration.mixture import Texts, load_texts
from tawny.calibration.windows import SEED_APART, evaluation_windows, tokenise
from tawny.errors import ModelError, RecipeError
from tawny.evaluation.hidden_states import stream_through
from tawny.evaluation.sources import name_of, open_stack_of, shared_tokenizer
from tawny.machine import peak_memory
from tawny.model.context import check_ids, seqlen_of
from tawny.model.stack import Stack
from tawny.model.streams import Samples, Stream
from tawny.model.structure import TOKENS, evaluating, input_of, predicts_tokens
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent
from tawny.solvers.divergence import kl

TEXT, PICTURES = "wikitext2", "sample"
MOST_TEXTS, MOST_PICTURES, SEQLEN = 1000, 100, 128


@dataclass(frozen=True)
class Features:
    """A model beside its dense one on the same samples; the first lines of this file say what is measured.

    `seqlen` counts hidden states a sample. `kl`, `top1` and `top5` are None where the model gives no logits of several classes.
    """

    cosine: float
    cosine_stderr: float
    error: float
    error_stderr: float
    neighbours: float
    neighbours_stderr: float
    kl: float | None
    kl_stderr: float
    top1: float | None
    top1_stderr: float
    top5: float | None
    samples: int
    seqlen: int
    data: str
    sha256: str
    against: str
    compute: str
    seconds: float
    peak_memory: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
@opens_models
def features(
    source: str | Path | nn.Module,
    dense: str | Path | nn.Module,
    data: Texts | Tensor | Mapping[str, Tensor] | Samples | None = None,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    tokenizer: Any = None,
    strict: bool = False,
    compute: str = "auto",
    device: str = "cpu",
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Features:
    """Compare a model's output with that of its dense one.

    Args:
        data: a text or pictures, named as for a calibration; tokens, or tensors by the names of the model's inputs; wikitext2 or the
            pictures of `sample` if None.
        samples: windows from the start of the text, or crops of pictures; at most 1000, or 100 pictures, if None.
        seqlen: tokens a window; 128 if None, and never more than the model has positions for.
        tokenizer: of a live module and a text, or the image processor of one and pictures.
        strict: refuse the first picture that cannot be read, instead of skipping it.
        compute: dtype of forwards: auto, float32, bfloat16 or float16.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError: the two give features of different shapes, take different inputs, or have different tokenizers.
        RecipeError: `seqlen` is given for a model that does not read tokens.
        TextError: the text does not hold as many windows, or no picture can be read.
    """
    start = time.perf_counter()
    opened = [open_stack_of(model, compute, device, progress.say) for model in (dense, source)]
    stacks = [stack for stack, _ in opened]
    given, about = _samples(opened, data, samples, seqlen, tokenizer, strict, progress)
    with evaluating(stacks[0].model), evaluating(stacks[1].model):
        streams = [
            stream_through(stack, given, progress, f"{name} model")
            for stack, name in zip(stacks, ("dense", "pruned"), strict=True)
        ]
        sums = _Sums()
        progress.phase("comparing", len(streams[0]), "batches")
        for chunk in range(len(streams[0])):
            sums.add(*(_Output(stream, chunk) for stream in streams))
            progress.step(f"batch {chunk}")
    return Features(
        **sums.finish(),
        **about,
        samples=len(given),
        seqlen=given.seqlen,
        against=name_of(dense),
        compute=str(stacks[1].compute).removeprefix("torch."),
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(),
    )


def _samples(
    opened: list[tuple[Stack, Path | None]],
    data: Texts | Tensor | Mapping[str, Tensor] | Samples | None,
    samples: int | None,
    seqlen: int | None,
    tokenizer: Any,
    strict: bool,
    progress: Progress,
) -> tuple[Samples, dict[str, Any]]:
    """What both models are shown, and how it is called."""
    (stack, folder), (other, _) = opened[-1], opened[0]
    kinds = [input_of(each.model) for each, _ in opened]
    if len(set(kinds)) > 1:
        raise ModelError(
            f"the dense model takes {kinds[0]} and the other {kinds[1]}: give the model it was made from"
        )
    if isinstance(data, Tensor | Samples):
        given, about = data if isinstance(data, Samples) else Samples(data), {"data": "given", "sha256": ""}
    elif isinstance(data, Mapping):
        positions = None if TOKENS in data else stack.positions(data)
        given, about = Samples(data, seqlen=positions), {"data": "given", "sha256": ""}
    elif kinds[0] != TOKENS:
        if seqlen is not None:
            raise RecipeError(f"seqlen counts tokens, and this model takes {kinds[0]}: leave it out")
        pictures = PICTURES if data is None else data
        how: dict[str, Any] = {"processor": tokenizer, "say": progress.say, "strict": strict}
        read = read_inputs(stack, folder, pictures, samples or MOST_PICTURES, SEED_APART, **how)
        given, about = read[0], {"data": read[1]["name"], "sha256": read[1]["sha256"]}
    else:
        length = min(seqlen_of(each.model, seqlen or SEQLEN) for each, _ in opened)
        tokenizer = tokenizer or shared_tokenizer([place for _, place in opened if place is not None])
        text = load_texts(TEXT if data is None else data, "evaluation", tokenizer)
        tokens = tokenise(text, tokenizer, around=not predicts_tokens(stack.model))
        given = Samples(evaluation_windows(tokens, length, samples)[: samples or MOST_TEXTS])
        about = {"data": text.name, "sha256": text.sha256}
    for each in (stack, other):
        if TOKENS in given.inputs:
            check_ids(each.model, given.tokens)
    return given, about


class _Output:
    """What one model gives for one chunk: features `[batch, positions, hidden]`, and logits where it has them."""

    def __init__(self, stream: Stream, chunk: int) -> None:
        self.stack, self.hidden = stream.stack, stream.hidden[chunk]
        self.inputs = stream.samples.take(stream.slices[chunk]).inputs
        self.valid = stream.valid(chunk)
        self.features = self.stack.features(self.inputs, self.hidden).float()
        headed = self.stack.model.base_model is not self.stack.model
        self.gives_logits = headed and _has_logits(self.stack, self.inputs, self.hidden)

    def logits(self, row: int) -> Tensor:
        """Log-probabilities `[events, classes]` of one sample: of its class, or of the token at each place."""
        inputs = {name: value[row : row + 1] for name, value in self.inputs.items()}
        log_probabilities = self.stack.logits(inputs, self.hidden[row : row + 1])[0].float().log_softmax(-1)
        events = log_probabilities if log_probabilities.dim() == 2 else log_probabilities[None]
        return events if self.valid is None or len(events) != self.valid.shape[1] else events[self.valid[row]]


def _has_logits(stack: Stack, inputs: Any, hidden: Tensor) -> bool:
    """Whether there are classes to compare: of a single output, such as a reranker's score, the softmax is 1 whatever it is."""
    logits = stack.output({name: value[:1] for name, value in inputs.items()}, hidden[:1]).get("logits")
    return logits is not None and logits.dim() in (2, 3) and logits.shape[-1] > 1


class _Sums:
    """Numbers of each sample, `[samples]` float64 by name, and its pooled features in both models."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        self.pooled: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, dense: _Output, other: _Output) -> None:
        """One chunk of both models.

        Raises:
            ModelError: their features differ in shape.
        """
        g, f = dense.features, other.features.to(dense.features.device)
        if f.shape != g.shape:
            raise ModelError(
                f"the dense model gives features {list(g.shape)} and the other {list(f.shape)}: give the model it was made from"
            )
        weight = (
            torch.ones(g.shape[:2], device=g.device)
            if dense.valid is None
            else dense.valid.to(g.device, g.dtype)
        )
        counts = weight.sum(1)
        self._keep("lost", ((f - g).square().sum(-1) * weight).sum(1))
        self._keep("energy", (g.square().sum(-1) * weight).sum(1))
        self._keep("cosine", (nn.functional.cosine_similarity(f, g, dim=-1) * weight).sum(1) / counts)
        for kept, made in zip(self.pooled, (g, f), strict=True):
            kept.append(((made * weight[..., None]).sum(1) / counts[:, None]).cpu())
        if dense.gives_logits and other.gives_logits:
            distances = [_distance(dense.logits(row), other.logits(row)) for row in range(len(g))]
            for name in distances[0]:
                self._keep(name, torch.tensor([each[name] for each in distances]))

    def _keep(self, name: str, values: Tensor) -> None:
        self.rows.setdefault(name, []).append(values.double().cpu())

    def finish(self) -> dict[str, Any]:
        each = {name: torch.cat(values) for name, values in self.rows.items()}
        lost, energy = each.pop("lost"), each.pop("energy")
        each["error"] = lost / energy.mean()
        near = [_nearest(torch.cat(some)) for some in self.pooled]
        each["neighbours"] = (near[0] == near[1]).double()
        facts: dict[str, Any] = {"kl": None, "top1": None, "top5": None, "kl_stderr": 0.0, "top1_stderr": 0.0}
        for name, values in each.items():
            facts[name] = float(values.mean())
            if name != "top5":
                # The error is a ratio of two means over the same samples: the delta method.
                off = values - values.mean() * energy / energy.mean() if name == "error" else values
                facts[f"{name}_stderr"] = float(off.std()) / math.sqrt(len(off)) if len(off) > 1 else 0.0
        return facts


def _distance(p_EC: Tensor, q_EC: Tensor) -> dict[str, float]:
    """KL(p ‖ q), and how often p's first is q's first and among q's first five; means over events."""
    first = p_EC.argmax(-1, keepdim=True)
    five = q_EC.topk(min(5, q_EC.shape[-1]), -1).indices
    return {
        "kl": float(kl(p_EC, q_EC).mean()),
        "top1": float((q_EC.argmax(-1, keepdim=True) == first).double().mean()),
        "top5": float((five == first).any(-1).double().mean()),
    }


def _nearest(pooled_NH: Tensor) -> Tensor:
    """For each sample the most similar of the others."""
    unit_NH = nn.functional.normalize(pooled_NH, dim=-1)
    return (unit_NH @ unit_NH.T).fill_diagonal_(-math.inf).argmax(1)
