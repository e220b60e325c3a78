"""EAP and EAP-IG: every edge of a model scored with a handful of passes.

Edge attribution patching (Syed et al. 2023, arXiv:2310.10348) estimates the effect of patching one
edge to first order: (ablated output of the source - its clean output) times the gradient of the
metric at what the receiver reads, before its norm. EAP-IG (Hanna et al. 2024, arXiv:2403.17806)
averages that gradient over input embeddings between the ablated and the clean one.

Both are exact where the metric is linear in the edge, and blind where it is flat at the points
looked at. How much they miss as a whole is the completeness gap. Rule ``adaptive`` looks for what
is missed along the path, see ``ig_path`` and ``jumps``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from circuitlab import Ablation, Ablator, OptionError, Site, choose_batch_size
from circuitlab_edge_attribution.ig_path import InputPath, walk
from circuitlab_edge_attribution.jumps import Jump, locate, shares
from circuitlab_edge_attribution.parts import cut_into_parts, sum_parts

if TYPE_CHECKING:
    from circuitlab import EncodedTask, Run, TracedModel, Wiring

Method = Literal["eap", "eap-ig"]
Rule = Literal["midpoint", "left", "adaptive"]

#: Steps of the path whose gradients are kept and multiplied together: one product for all of them.
RUNS = 5


@dataclass(frozen=True)
class Completeness:
    """How much of the whole effect the scores account for.

    Attributes:
        effect: metric(input ablated, all else recomputed) - metric(clean), mean over pairs. With
            counterfactual ablation that is metric(corrupt) - metric(clean).
        cuts: Sum of the scores across each cut of the residual stream, keyed by site. Each cut
            carries the whole effect, so each sum would equal ``effect`` if scores were exact and
            edges did not interact.
        at_clean: The same sum across the input's cut at the point nearest the clean prompt: the
            clean prompt itself for EAP, the last step of the path for EAP-IG. Far from
            ``explained`` where the metric is flat around the clean prompt, so that one edge alone
            may do nothing.
    """

    effect: float
    cuts: dict[str, float]
    at_clean: float

    @property
    def explained(self) -> float:
        """Sum of the scores of the edges out of ``input``."""
        return self.cuts["resid_pre.0"]

    @property
    def gap(self) -> float:
        """``effect - explained``, in metric units; 0 when the scores add up."""
        return self.effect - self.explained

    @property
    def share(self) -> float | None:
        """``explained / effect``; None when there is no effect to explain."""
        return self.explained / self.effect if self.effect else None


@dataclass(frozen=True)
class EdgeScores:
    """Scores ``[n_sources, n_receivers]`` in the order of ``model.wiring``, and their completeness.

    A score estimates metric(edge patched) - metric(clean), mean over pairs. ``jumps`` are what rule
    ``adaptive`` found; None with the other rules, which do not look. ``unresolved`` counts pairs
    on which it looked at as many points as it may, and more are wanted.
    """

    scores: Tensor
    completeness: Completeness
    jumps: tuple[Jump, ...] | None = None
    unresolved: int = 0

    @property
    def lost_jumps(self) -> list[Jump]:
        """Jumps that no edge's score has."""
        return [jump for jump in self.jumps or () if not jump.shared]


def edge_scores(
    model: TracedModel,
    pairs: EncodedTask,
    *,
    method: Method = "eap-ig",
    ig_steps: int = 5,
    ig_rule: Rule = "midpoint",
    ablation: Ablation = "counterfactual",
    batch_size: int | None = None,
    stage: str | None = None,
) -> EdgeScores:
    """Score every edge of the model.

    Args:
        model: Any traced model.
        pairs: The encoded task.
        method: Gradient at the clean input, or averaged along a path to it.
        ig_steps: Points on that path.
        ig_rule: Where they lie: ``midpoint`` (k + 1/2) / steps, or ``left`` k / steps from the
            ablated end, as the code of Hanna et al. does. ``adaptive`` begins with the midpoints,
            adds points where the metric moves otherwise than the gradient says, and shares jumps
            out among the edges that bring them about.
        ablation: What replaces a source's output: its output on the corrupt prompt, zero, or its
            mean over all clean prompts and real positions.
        batch_size: Pairs per pass; None chooses by memory.
        stage: Name of the :class:`circuitlab.Checkpoint` that an interrupted run goes on from, and
            whose parts shards share; None for none. Rule ``adaptive`` has none. In a shard of a
            run, inside :func:`circuitlab.sharded`, scores are NaN.

    Raises:
        OptionError: ``ig_steps`` or ``batch_size`` is below 1, or rule ``adaptive`` with method
            ``eap`` or a type narrower than float32.
        NumericsError: an activation or gradient is not finite.
    """
    check_path(model, method, ig_steps, ig_rule, batch_size)
    wiring = model.wiring
    size = choose_batch_size(model, pairs, batch_size)
    alphas = path_points(method, ig_steps, ig_rule)
    adaptive = ig_rule == "adaptive"
    scorer = Scorer(model, Ablator(model, pairs, ablation, size), alphas, adaptive)
    planned = choose_batch_size(model, pairs, batch_size, planned=True)
    summed, effect, at_clean = sum_parts(
        scorer, cut_into_parts(pairs, planned, scorer.total.numel()), size,
        None if adaptive else stage, f"attributing {wiring.n_edges:,} edges",
    )  # fmt: skip
    scores = summed / len(pairs)
    return EdgeScores(
        scores,
        Completeness(
            effect=effect / len(pairs),
            cuts=_cut_sums(wiring, scores, corrupt=ablation == "counterfactual"),
            at_clean=at_clean / len(pairs),
        ),
        tuple(scorer.jumps) if ig_rule == "adaptive" else None,
        scorer.unresolved,
    )


def check_path(
    model: TracedModel, method: Method, ig_steps: int, ig_rule: Rule, batch_size: int | None
) -> None:
    """Refuse options of :func:`edge_scores` that do not fit.

    Raises:
        OptionError: names them.
    """
    if ig_rule == "adaptive":
        _check_adaptive(model, method)
    for name, value in (("ig_steps", ig_steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise OptionError(f"{name} is {value}; give 1 or more")


def _check_adaptive(model: TracedModel, method: Method) -> None:
    if method == "eap":
        raise OptionError(
            "--ig-rule adaptive follows the path of eap-ig, and method eap has none; "
            "use --method eap-ig, or leave --ig-rule out"
        )
    if model.dtype.itemsize < torch.float32.itemsize:
        raise OptionError(
            f"--ig-rule adaptive takes steps that {str(model.dtype).removeprefix('torch.')} does "
            f"not resolve; run in a wider type (--dtype float32)"
        )


class Scorer:
    """Scores batches with one method and one ablation."""

    def __init__(
        self, model: TracedModel, ablator: Ablator, alphas: list[float] | None, adaptive: bool
    ) -> None:
        self.model, self.ablator, self.alphas, self.adaptive = model, ablator, alphas, adaptive
        self.start = Site("resid_pre", 0)
        shape = (len(model.wiring.sources), len(model.wiring.receivers))
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.effect = 0.0
        self.at_clean = 0.0
        self.jumps: list[Jump] = []
        self.unresolved = 0

    def add(self, batch: EncodedTask) -> None:
        """Add a batch's scores, whole effect, and the sum of scores nearest the clean prompt."""
        clean = self._clean_run(batch)
        difference, corrupt = self.ablator.difference(batch, clean)
        reference = clean.logits[:, -1]
        embedding = clean[self.start].to(difference.dtype)
        ablated = self.ablator.logits(batch, embedding + difference[0], corrupt)
        ends = batch.score(ablated, reference).double(), batch.score(reference, reference).double()
        self.effect += float((ends[0] - ends[1]).sum())
        if self.adaptive:
            del clean, corrupt
            self._walk(InputPath(self.model, batch, embedding, difference, reference, ends))
            return
        runs = [clean]
        if self.alphas is None:
            self.total += self._scores(runs, difference)
        else:
            del clean, corrupt
            # On a host all share their round trips.
            size = len(self.alphas) if self.model.remote else RUNS
            for group in range(0, len(self.alphas), size):
                alphas = self.alphas[group : group + size]
                runs.clear()
                for alpha in alphas:
                    point = embedding + (1 - alpha) * difference[0]
                    runs.append(self._run_at(batch, point, reference))
                share = len(alphas) / len(self.alphas)
                self.total += self._scores(runs, difference) * share
        nearest = runs[-1].gradient(self.start).to(difference.dtype)
        self.at_clean += float((nearest * difference[0]).double().sum())

    def take(self) -> tuple[Tensor, Tensor]:
        """What was added since the last time, ``[n_sources, n_receivers]`` and ``[2]``."""
        taken = self.total, self.total.new_tensor([self.effect, self.at_clean])
        self.total, self.effect, self.at_clean = torch.zeros_like(self.total), 0.0, 0.0
        return taken

    def _walk(self, path: InputPath) -> None:
        """Add scores with as many points of the path as it needs, and what jumps it has."""
        assert self.alphas is not None
        walked = walk(path, len(self.alphas), self._scores)
        self.total += walked.scores
        self.at_clean += walked.at_clean
        self.unresolved += walked.unresolved
        for jump in locate(path, walked.gaps):
            found = shares(path, jump)
            if found is not None:
                self.total += jump.size * found
            number = path.batch.numbers[jump.pair]
            self.jumps.append(replace(jump, pair=number, shared=found is not None))

    def _clean_run(self, batch: EncodedTask) -> Run:
        """The clean run, differentiated when the gradient is wanted there."""
        if self.alphas is not None:
            return self.model.run(batch.clean, read=self.model.source_sites)
        return self.model.run(
            batch.clean,
            read=self.model.source_sites,
            gradient_of=lambda logits: batch.score(logits, logits.detach()),
            gradient_at=(self.start, *self.model.receiver_sites),
        )

    def _run_at(self, batch: EncodedTask, embedding: Tensor, reference: Tensor) -> Run:
        return self.model.run(
            batch.clean,
            write={self.start: embedding},
            gradient_of=lambda logits: batch.score(logits, reference),
            gradient_at=(self.start, *self.model.receiver_sites),
        )

    def _scores(self, runs: list[Run], difference: Tensor) -> Tensor:
        """(ablated - clean output) . mean gradient of the runs, summed over pairs and positions."""
        outputs = difference.flatten(1)
        scores = torch.zeros(self.total.shape, dtype=outputs.dtype, device=outputs.device)
        for block, gradient in self.model.receiver_gradients(*runs):
            seen = outputs[: block.n_sources]
            scores[: block.n_sources, block.receivers] = seen @ gradient.flatten(1).T
        return scores.double().cpu()


def _cut_sums(wiring: Wiring, scores: Tensor, *, corrupt: bool) -> dict[str, float]:
    """Sum of the scores across each cut; only the input's where no run has all ablated outputs."""
    sums = {}
    for name, n_sources, first_receiver in _cuts(wiring):
        sums[name] = float(scores[:n_sources, first_receiver:].sum())
        if not corrupt:
            break
    return sums


def _cuts(wiring: Wiring) -> Iterator[tuple[str, int, int]]:
    for block in wiring.blocks():
        if block.kind == "attention":
            yield f"resid_pre.{block.layer}", block.n_sources, block.receivers.start
        elif block.kind == "mlp" and not wiring.parallel:
            yield f"resid_mid.{block.layer}", block.n_sources, block.receivers.start
        elif block.kind == "logits":
            yield f"resid_post.{block.layer - 1}", block.n_sources, block.receivers.start


def path_points(method: Method, steps: int, rule: Rule) -> list[float] | None:
    """Points between the ablated (0) and the clean (1) input; None where there is no path."""
    if method == "eap":
        return None
    shift = 0.5 if rule == "midpoint" else 0.0
    return [(step + shift) / steps for step in range(steps)]
