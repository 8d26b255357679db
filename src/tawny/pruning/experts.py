"""Whole experts leave: seen, chosen, tried and cut out of a block, and said in config.json.

Each block runs twice on what the blocks before it give without their experts: with all experts, which shows how often each is
chosen and how much it adds, and without those that leave, for the next block. The checkpoint is written without them at once:
a zero row of a router could still be chosen. Where all blocks keep equally many, the result is an ordinary checkpoint. Where they
differ, `per_layer_config` says so, which Tawny opens.

Which setting counts the experts is found by its value, and proven by the shapes of a model that has another one. At the end the
result is opened, and computes what the source does without the experts.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, final

import torch
from torch import Tensor, nn

from tawny.errors import ModelError, RecipeError, UserError
from tawny.model.couplings import probe_of
from tawny.model.mixtures import Mixture, Routed, routed, without
from tawny.model.own_blocks import KEY
from tawny.model.skeleton import build_skeleton
from tawny.model.stack import Stack
from tawny.model.streams import Samples, Stream
from tawny.model.structure import TOKENS
from tawny.packed.opening import open_stack
from tawny.progress import silent
from tawny.pruning.block import PRUNED
from tawny.pruning.output import End
from tawny.pruning.prepare import Job, output_count
from tawny.pruning.session import Session
from tawny.record import LinearRecord
from tawny.run.run import Run
from tawny.run.walk import Advance, Block, Visitor, walk, walk_back
from tawny.slimming.widths import config_of_block, described, key_of_text
from tawny.solvers.experts import ExpertsSeen, leave_one_by_one, removed_experts

PROBE = "probe"  # what shows that the result computes what was meant
_ASKED = "experts"  # the backward walk's name in the journal
_CLOSE = 1e-3  # of what the models compute: sums of fewer numbers are added up in another order
_ROUNDED = 0.1  # where numbers are narrow or another dtype is written: close scores may change places
_AGREED = 0.99  # of tokens: other sizes of a product round scores in another way, and near ones change places
_PIECE = 512  # tokens whose experts' outputs are there at once


def check_experts(session: Session) -> None:
    """Refuse before the work what only its end would show.

    Raises:
        ModelError: no setting counts the experts.
        RecipeError: experts are asked one by one, and several processes share the run.
    """
    settings_of_count(session.job)
    if session.job.expert_solver.asks_output and session.run.ranks.several:
        raise RecipeError(
            "fisher asks the output in one process, and torchrun started several: run it with one"
        )


def settings_of_count(job: Job) -> list[str]:
    """The settings of the configuration that say how many experts a block has.

    Raises:
        ModelError: none does.
    """
    stack, mixtures = job.stack, {i: m for i, m in enumerate(job.mixtures) if m is not None}
    config = stack.config.get_text_config()
    plain = config.to_dict()
    keys = [
        key
        for key in plain
        if all(_count(config, index, key) == mixture.count for index, mixture in mixtures.items())
    ]
    if KEY in plain:  # blocks differ already, and hardly anything else differs as the experts do
        keys = [key for key in keys if any(key in own for own in plain[KEY].values())]
    else:
        keys = [key for key in keys if _counts_experts(stack, mixtures, key)]
    if not keys:
        count = next(iter(mixtures.values())).count
        raise ModelError(
            f"config.json of {config.model_type!r} has no setting of its own for the {count} experts of a block, so none can be cut out"
        )
    return keys


def _count(config: Any, index: int, key: str) -> Any:
    value = getattr(config_of_block(config, index), key, None)
    return None if isinstance(value, bool) else value


def _counts_experts(stack: Stack, mixtures: Mapping[int, Mixture], key: str) -> bool:
    """Whether a model with another value of the setting has as many experts, and is the same for the rest."""
    changed = copy.deepcopy(stack.config)
    fewer = next(iter(mixtures.values())).count - next(iter(mixtures.values())).groups
    setattr(changed.get_text_config(), key, fewer)
    try:
        model = build_skeleton(changed, stack.compute)
    except Exception:  # whatever a width of heads, say, makes of a number that is not its own
        return False
    cut = {name for mixture in mixtures.values() for name in mixture.tensors}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return all(
        shapes.get(name) == ((fewer, *value.shape[1:]) if name in cut else value.shape)
        for name, value in stack.model.state_dict().items()
    )


# --- what the output feels ---------------------------------------------------------------------------------------


def asking_experts(session: Session) -> Mapping[str, Mapping[str, list[float]]]:
    """By mixture when each expert `left` and what the output `felt` after each, where the solver asks; else nothing."""
    job = session.job
    if not job.expert_solver.asks_output or session.samples is None:
        return {}
    samples = session.samples.first(output_count(job.recipe, len(session.samples), session.samples.seqlen))
    asking = _Asking(job)
    end = End(session, samples)
    walk_back(session.run, job.stack, samples, [asking], end=end, name=_ASKED, phase="asking the output")
    return asking.answers


@final
class _Asking(Visitor):
    """Lets the experts of each block leave one by one, on the dense model, by what its output feels."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.answers: dict[str, dict[str, list[float]]] = {}
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.gradients: list[Tensor] = []

    def begin(self, kept: Mapping[str, Any]) -> None:
        self.answers = dict(kept.get("answers", {}))

    def keep(self, blocks: int) -> Mapping[str, Any]:
        return {"answers": self.answers}

    @contextmanager
    def around(self, block: Block) -> Iterator[None]:
        mixture = self.job.mixtures[block.index]
        if mixture is None:
            yield
            return

        def called(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if output.requires_grad:
                tokens, picked, _ = mixture.given(args, kwargs)
                self.seen.append((tokens.detach(), picked))
                output.register_hook(self.gradients.append)  # type: ignore[no-untyped-call]

        with mixture.experts.register_forward_hook(called, with_kwargs=True):
            yield
        self.seen, self.gradients = [], []

    def visit(self, block: Block) -> None:
        mixture, detail = self.job.mixtures[block.index], block.run.progress.detail
        if mixture is None:
            return
        with block.run.clock("solve"), block.stack.plain_experts():
            felt: list[Tensor] = []
            for (x_TH, picked), g_TH in zip(self.seen, self.gradients, strict=True):
                one_T1, every_T1 = g_TH.new_ones(len(x_TH), 1), torch.ones_like(picked[:, :1])
                felt_E = [
                    torch.linalg.vecdot(
                        mixture.outputs(x_TH, every_T1 * expert, one_T1).double(), g_TH.double()
                    )
                    for expert in range(mixture.count)
                ]
                felt.append(torch.stack(felt_E, 1))
                detail("asking the experts", len(felt), len(self.seen))
            x_TH = torch.cat([tokens for tokens, _ in self.seen])
            picked, _ = mixture.route(x_TH, torch.tensor([], dtype=torch.int64))
            same_T = (picked == torch.cat([picked for _, picked in self.seen])).all(1)
            if float(same_T.float().mean()) < _AGREED:
                raise ModelError(
                    f"the router beside {mixture.name} goes by more than a token; choose --solver reap"
                )
            most = mixture.count - mixture.least
            left_E, losses = leave_one_by_one(
                x_TH, torch.cat(felt), mixture.route, removed=most, groups=mixture.groups
            )
        self.answers[mixture.name] = {"left": left_E.tolist(), "felt": losses.tolist()}


# --- the cut -----------------------------------------------------------------------------------------------------


@final
class Cut(Visitor):
    """Lets experts leave each block, and records which; what is written of the block afterwards has fewer of them.

    Args:
        answers: of `asking_experts`.
    """

    def __init__(
        self,
        session: Session,
        allocation: Mapping[str, float],
        answers: Mapping[str, Mapping[str, list[float]]],
    ) -> None:
        self.session, self.allocation, self.answers = session, allocation, answers

    def begin(self, kept: Mapping[str, Any]) -> None:
        record = self.session.record
        record.linears = [LinearRecord.from_dict(entry) for entry in kept.get("linears", [])]
        record.experts = list(kept.get("experts", []))

    def keep(self, blocks: int) -> Mapping[str, Any]:
        record = self.session.record
        return {"linears": [asdict(entry) for entry in record.linears], "experts": record.experts}

    def visit(self, block: Block) -> None:
        stack, index, mixture = block.stack, block.index, self.session.job.mixtures[block.index]
        if mixture is None:
            return
        start = time.perf_counter()
        seen = self._seen(block, mixture)
        removed = round(self.allocation[mixture.linears[0].name] * mixture.count)
        scores_E = self.session.job.expert_solver.expert_scores(seen)
        gone = removed_experts(scores_E, removed, mixture.groups)
        with without(mixture, gone):
            Advance(*block.streams).visit(block)
        kept = torch.tensor([expert for expert in range(mixture.count) if expert not in gone.tolist()])
        for name in mixture.tensors if self.session.output is not None else ():  # a rehearsal writes nothing
            stack.stored[name] = stack.stored[name].index_select(0, kept.to(stack.stored[name].device))
        self.session.record.experts.append(
            {
                "block": index,
                "name": mixture.name,
                "picks": mixture.picks,
                "kept": kept.tolist(),
                "removed": gone.tolist(),
                "chosen": seen.chosen.tolist(),
                "scores": scores_E.tolist(),
                "felt": self.answers[mixture.name]["felt"][removed - 1] if self.answers and removed else None,
            }
        )
        self._record(mixture, index, set(gone.tolist()), removed / mixture.count, time.perf_counter() - start)

    def _record(self, mixture: Mixture, index: int, gone: set[int], target: float, seconds: float) -> None:
        for place, linear in enumerate(mixture.linears):
            left = linear.expert in gone
            self.session.record.linears.append(
                LinearRecord(
                    name=linear.name,
                    shape=linear.shape,
                    block=index,
                    stage=0,
                    target=target,
                    zeros=linear.numel if left else 0,
                    sparsity=float(left),
                    pattern="experts",
                    error=float(left),
                    error_kind="weights",
                    seconds=0.0 if place else seconds,
                )
            )

    def _seen(self, block: Block, mixture: Mixture) -> ExpertsSeen:
        """What the samples show of the experts, and what their weights do."""
        stack, run, stream = block.stack, block.run, block.streams.get(PRUNED)
        observed = mixture.count if stream is not None else 0
        chosen_E = torch.zeros(observed, dtype=torch.int64)
        strength_E = torch.zeros(observed, dtype=torch.float64)
        with run.clock("observe"):
            for chunk in range(len(stream) if stream is not None else 0):
                assert stream is not None
                with routed(mixture) as calls:
                    stack.forward(block.index, stream.hidden[chunk].clone(), stream.call(block.index, chunk))
                for one in calls:
                    self._count(mixture, one, stream.valid(chunk), chosen_E, strength_E)
                run.progress.detail("observing", chunk + 1, len(stream))
        if stream is not None and run.ranks.several:
            run.ranks.sum([chosen_E, strength_E])
        sizes_E = torch.zeros(mixture.count, dtype=torch.float64)
        for linear in mixture.linears:
            assert linear.expert is not None
            sizes_E[linear.expert] += float(stack.look(linear).abs().sum(dtype=torch.float64))
        left = self.answers[mixture.name]["left"] if self.answers else []
        return ExpertsSeen(chosen_E, strength_E, sizes_E, torch.tensor(left, dtype=torch.float64))

    def _count(
        self, mixture: Mixture, one: Routed, valid_BT: Tensor | None, chosen_E: Tensor, strength_E: Tensor
    ) -> None:
        """Add what a call shows of each expert; what is padding does not count."""
        rows_T = torch.arange(len(one.tokens))
        if valid_BT is not None and valid_BT.numel() == len(rows_T):
            rows_T = rows_T[valid_BT.flatten().cpu()]
        with self.session.job.stack.plain_experts():
            for rows in torch.split(rows_T.to(one.tokens.device), _PIECE):
                piece = one.at(rows)
                norms_TK = torch.linalg.vector_norm(mixture.each(piece).float(), dim=-1)
                added = (norms_TK * piece.gates.float()).flatten().double().cpu()
                picked = piece.picked.flatten().cpu()
                chosen_E += torch.bincount(picked, minlength=mixture.count)
                strength_E.index_add_(0, picked, added)


def probe_samples(stack: Stack) -> Samples:
    """What goes through the blocks beside the samples, to see that the result computes what was meant."""
    probe = probe_of(stack)
    return Samples(probe, seqlen=None if TOKENS in probe else stack.positions(probe))


def describe_cut(session: Session, probe: Stream) -> None:
    """Say in config.json how many experts are left, and prove that the result opens and computes what was meant.

    Args:
        probe: after the last block of the source without the experts.

    Raises:
        ModelError: it does not open, or computes something else.
    """
    job, output, stack = session.job, session.output, session.job.stack
    assert output is not None and job.folder is not None
    keys, left = settings_of_count(job), {one["block"]: len(one["kept"]) for one in session.record.experts}
    said: list[dict[str, int]] = [
        dict.fromkeys(keys, left[index]) if index in left else {} for index in range(len(stack))
    ]
    raw = json.loads((output.folder / "config.json").read_text(encoding="utf-8"))
    key = key_of_text(stack.config, raw)
    text = described(stack.config.get_text_config(), raw[key] if key else raw, said)
    output.write_text("config.json", json.dumps({**raw, key: text} if key else text, indent=2) + "\n")
    if KEY in text:
        session.record.warnings.append(
            "blocks keep different numbers of experts, which Tawny opens and plain transformers does not; -a uniform writes an "
            "ordinary checkpoint"
        )
    inputs = probe.samples.inputs
    expected = stack.output(inputs, probe.hidden[0])[0].float()
    try:
        result = open_stack(output.folder, stack.compute, str(stack.device))
    except UserError as error:
        raise ModelError(
            f"what was cut does not open ({error}): config.json cannot say that experts are gone"
        ) from error
    given = {PROBE: Samples(inputs, seqlen=probe.samples.seqlen)}
    ends = walk(Run.unkept(silent), result, given, [Advance(PROBE)], ends=given)
    computed = result.output(inputs, ends[PROBE].hidden[0])[0].float()
    session.record.parameters = sum(p.numel() for p in result.model.parameters())
    apart = float((computed - expected).norm() / expected.norm())
    exact = job.recipe.dtype is None and stack.compute.itemsize >= 4
    if not apart <= (_CLOSE if exact else _ROUNDED):
        raise ModelError(
            f"the cut model computes something else than {job.source} without these experts (its output is {apart:.2g} away): a part of "
            "it depends on how many experts there are; choose another pattern"
        )
