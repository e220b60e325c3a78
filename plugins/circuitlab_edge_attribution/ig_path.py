"""Adaptive integrated gradients: points are added where the metric moves and no gradient says so.

Along the path from the ablated input (alpha 0) to the clean one (alpha 1) the metric's change over
a segment is known exactly from its two ends, and estimated by the gradient at its middle. Where the
two differ the segment is halved. A steep ramp is resolved in this way: gradients inside it are
found, and the scores add up. What still differs when a segment is too narrow to be halved is no
ramp but a jump, which no gradient sees (see ``jumps``).

A segment's middle becomes an end of its halves, so each point costs one forward and one backward
pass, and every gradient that is used is used once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab import Site

if TYPE_CHECKING:
    from circuitlab import EncodedTask, Run, TracedModel

#: A segment is halved when its change differs from the gradient's estimate by more than this share
#: of the metric's range along the path.
TOLERANCE = 0.005
#: A segment narrower than this is not halved: what is left is a jump. 2**-20 of the way still moves
#: a float32 embedding by several of its smallest steps.
NARROWEST = 2.0**-20
#: Points added for one pair at most; a jump takes about 36.
EXTRA = 512
#: Points run together at least, whatever the batch: EAP-IG keeps as many runs at once.
TOGETHER = 5

#: Where the path runs.
START = Site("resid_pre", 0)

#: From runs and the sources' differences to scores ``[n_sources, n_receivers]``.
Scores = Callable[[list["Run"], Tensor], Tensor]


@dataclass(frozen=True)
class Segment:
    """A part of one pair's path: its ends, and the metric there, ``low`` being the ablated side."""

    row: int
    low: float
    high: float
    score_low: float
    score_high: float

    @property
    def width(self) -> float:
        """Share of the path."""
        return self.high - self.low

    @property
    def middle(self) -> float:
        """Where the gradient is taken."""
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Gap:
    """A segment too narrow to halve, and what its gradient leaves unexplained.

    ``size`` is metric(ablated side) - metric(clean side): negative helps.
    """

    segment: Segment
    size: float


@dataclass(frozen=True)
class Walked:
    """What a walk along the path gives, summed over the batch.

    ``unresolved`` counts pairs whose points were used up before every segment was fine enough.
    """

    scores: Tensor
    at_clean: float
    gaps: tuple[Gap, ...]
    unresolved: int


@dataclass(frozen=True)
class InputPath:
    """Inputs between a batch's ablated and clean embeddings, and the metric along them.

    Attributes:
        model: The traced model.
        batch: The pairs.
        embedding: The clean one, ``[batch, pos, d_model]``.
        difference: Each source's ablated output less its clean one, ``[n_sources, batch, pos,
            d_model]``.
        reference: The clean run's last logits, ``[batch, vocab]``.
        ends: Metric at the ablated and at the clean end, ``[batch]`` each, float64.
    """

    model: TracedModel
    batch: EncodedTask
    embedding: Tensor
    difference: Tensor
    reference: Tensor
    ends: tuple[Tensor, Tensor]

    def at(
        self, rows: list[int], alphas: list[float], *, differentiate: bool = False, **reads: object
    ) -> tuple[Run, Tensor]:
        """Run chosen pairs, each at its own point of the path.

        Args:
            rows: Pairs of the batch; one may come several times.
            alphas: A point for each.
            differentiate: Whether to take the metric's gradient at every receiver.
            **reads: Passed to ``model.run``.

        Returns:
            The run, and the metric ``[rows]``, float64.
        """
        part = self.batch.rows(rows)
        start = self.embedding.shape[1] - part.clean.ids.shape[1]
        reference = self.reference[rows]
        back = 1 - self.embedding.new_tensor(alphas)[:, None, None]
        point = (self.embedding[rows] + back * self.difference[0, rows])[:, start:]
        options = dict(reads)
        if differentiate:
            options["gradient_of"] = lambda logits: part.score(logits, reference)
            options["gradient_at"] = (START, *self.model.receiver_sites)
        run: Run = self.model.run(part.clean, write={START: point}, **options)  # type: ignore[arg-type]  # plain keywords
        return run, part.score(run.logits[:, -1], reference).double()

    def difference_of(self, rows: list[int], run: Run) -> Tensor:
        """The sources' differences for the rows of a run, ``[n_sources, rows, pos, d_model]``."""
        return self.difference[:, rows, self.difference.shape[2] - run.mask.shape[1] :]


def walk(path: InputPath, steps: int, scores_of: Scores) -> Walked:
    """Follow the path in ``steps`` equal segments, halving those whose gradient misses something.

    Costs ``steps - 1`` forward passes beside those of the midpoint rule, and ``EXTRA`` points for a
    pair at most; when these are used up, what is missing stays in the completeness gap.
    """
    segments = _begin(path, steps)
    limit = _tolerances(path, segments)
    left = [EXTRA] * len(path.batch)
    shape = (len(path.model.wiring.sources), len(path.model.wiring.receivers))
    total, at_clean = torch.zeros(shape, dtype=torch.float64), 0.0
    gaps: list[Gap] = []
    unresolved: set[int] = set()
    first = True
    while segments:
        halves: list[Segment] = []
        size = max(len(path.batch), TOGETHER)
        for i in range(0, len(segments), size):
            part = segments[i : i + size]
            rows = [segment.row for segment in part]
            run, scores = path.at(rows, [segment.middle for segment in part], differentiate=True)
            difference = path.difference_of(rows, run)
            slope = (run.gradient(START).to(difference.dtype) * difference[0]).double().sum((1, 2))
            weights = []
            for segment, rate, score in zip(part, slope.tolist(), scores.tolist(), strict=True):
                missing = segment.score_low - segment.score_high - rate * segment.width
                if first and segment.high == 1.0:
                    at_clean += rate
                wanted = abs(missing) > limit[segment.row]
                halved = wanted and segment.width > NARROWEST and left[segment.row] > 1
                if halved:
                    left[segment.row] -= 2
                    halves += _halves(segment, score)
                elif wanted and segment.width <= NARROWEST:
                    gaps.append(Gap(segment, missing))
                elif wanted:
                    unresolved.add(segment.row)
                weights.append(0.0 if halved else segment.width)
            if any(weights):
                shares = difference.new_tensor(weights)[None, :, None, None]
                total += scores_of([run], difference * shares)
        segments, first = halves, False
    return Walked(total, at_clean, tuple(gaps), len(unresolved))


def _begin(path: InputPath, steps: int) -> list[Segment]:
    """Equal segments of every pair, with the metric at their ends."""
    rows = list(range(len(path.batch)))
    ends = [path.ends[0].tolist()]
    for step in range(1, steps):
        ends.append(path.at(rows, [step / steps] * len(rows))[1].tolist())
    ends.append(path.ends[1].tolist())
    return [
        Segment(row, step / steps, (step + 1) / steps, ends[step][row], ends[step + 1][row])
        for step in range(steps)
        for row in rows
    ]


def _tolerances(path: InputPath, segments: list[Segment]) -> list[float]:
    """What may be missing from a segment of each pair: a share of the range, and rounding."""
    rounding = 64 * torch.finfo(path.model.dtype).eps
    limits = []
    for row in range(len(path.batch)):
        values = [s.score_low for s in segments if s.row == row] + [float(path.ends[1][row])]
        size = max(map(abs, values))
        limits.append(max(TOLERANCE * (max(values) - min(values)), rounding * size))
    return limits


def _halves(segment: Segment, score: float) -> list[Segment]:
    middle = segment.middle
    return [
        Segment(segment.row, segment.low, middle, segment.score_low, score),
        Segment(segment.row, middle, segment.high, score, segment.score_high),
    ]
