"""ACDC: from the logits back, remove each edge without which the output hardly moves.

Conmy et al. 2023 (arXiv:2304.14997). A removed edge carries its source's output of the other run.
Edges are tried one after the other in the reverse of the order in which the model's wiring lists
them: receivers from the logits back (of a layer: MLP, then v, k, q, each from the last head to the
first), and for each receiver its sources from the last to the first. An edge is removed for good
when the distance between the output and that of the base run grows by less than the threshold.

Many edges are tried in one pass, with the same result as one by one: the pass guesses which of them
will be kept, tries each with those removed that are guessed to be removed before it, and stands as
far as the guesses come true. What it finds beyond that are the next pass's guesses.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import circuitlab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from circuitlab import CircuitGraph, Edge, EncodedTask, Mode, Patcher, Task, TracedModel

#: Most edges tried in one pass, and fewest, where the block has as many left.
MAX_WINDOW, MIN_WINDOW = 256, 4
#: Bytes of one residual stream for each edge of a pass: where a pass is long, few share it, for
#: what is tried after a wrong guess is tried again.
WINDOW_MEMORY = 8 * 2**20

_SCORE = {
    "noise": "metric(edge removed too) - metric(circuit), mean over pairs; negative = the edge "
    "helps the task",
    "denoise": "metric(circuit) - metric(edge removed too), a removed edge carrying its clean "
    "value, mean over pairs; negative = the edge helps the task",
}


def acdc(
    model: TracedModel,
    task: Task,
    *,
    mode: Annotated[
        Literal["noise", "denoise"],
        "remove edges from the clean run, or from the corrupt run by clean outputs",
    ] = "noise",
    distance: Annotated[
        Literal["kl", "metric"],
        "what must not grow: KL divergence from the base run in nats, or the metric's change",
    ] = "kl",
    threshold: Annotated[float, "remove an edge if the distance grows by less than this"] = 0.01,
    ablation: Annotated[
        Literal["counterfactual", "zero", "mean"], "what a removed edge carries"
    ] = "counterfactual",
    batch_size: Annotated[int | Literal["auto"], "pairs per pass"] = "auto",
) -> CircuitGraph:
    """Search the circuit by ACDC: remove each edge without which the output hardly moves.

    Conmy et al. 2023 (arXiv:2304.14997). In mode ``noise`` the base run is the clean one: it finds
    what the output needs. In mode ``denoise`` it is the corrupt one, and removed edges carry clean
    outputs: it finds what brings the clean output about.

    Returns:
        The circuit of the edges kept. A score is the metric with the edge's corrupt value less that
        with its clean value, all removed edges being removed: negative helps. ``increase`` is by
        how much the distance grew when the edge was tried.

    Raises:
        OptionError: the threshold is not above 0, or mode ``denoise`` has another ablation than
            ``counterfactual``.
        TaskError: positions of clean and corrupt prompts do not correspond.
        NumericsError: an activation is not finite.
    """
    if not threshold > 0:
        raise circuitlab.OptionError(
            f"--threshold {threshold}: edges that change nothing would be kept or removed by "
            f"rounding; give a number above 0"
        )
    size = None if batch_size == "auto" else batch_size

    def run(pairs: EncodedTask, mode: Mode) -> Iterator[Patcher]:
        return circuitlab.patchers(model, pairs, mode=mode, ablation=ablation, batch_size=size)

    scoring = run(model.encode(task), mode)
    moving = scoring if distance == "metric" else run(*_kl_pairs(model, task, mode))
    search = _Search(model, list(moving), threshold)
    with circuitlab.Checkpoint("acdc") as saved:
        search.load(saved.load())
        steps = search.steps(saved.keep)
        n_edges, done = len(search.edges), search.position
        for _ in circuitlab.track(steps, f"ACDC: {n_edges:,} edges", total=n_edges, done=done):
            pass
    if distance == "kl":
        search.patchers = ()  # before those that score are made: both take much memory
        search.patchers = list(scoring)
    circuit = _circuit(search, mode)
    unit = "nats of KL divergence" if distance == "kl" else task.metric
    circuit.graph["findings"]["distance from the base run"] = f"{search.distance:.4g} {unit}"
    circuit.graph["method"] = f"ACDC, {mode}, {'KL divergence' if distance == 'kl' else unit}"
    circuit.graph.update(threshold=threshold, ablation=ablation, mode=mode)
    return circuit


def _kl_pairs(model: TracedModel, task: Task, mode: Mode) -> tuple[EncodedTask, Mode]:
    """Pairs, and the mode to run them in, whose metric is minus KL divergence from the base run.

    The metric's reference is the clean run. So the corrupt prompts, where they are the base, are
    given as the clean ones: noising from there is denoising.
    """
    pairs = model.encode(replace(task, metric="kl-divergence"))
    if mode == "denoise":
        pairs = replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean)
    return pairs, "noise"


class _Search:
    """Which edges are kept, as far as it is decided.

    Attributes:
        edges: In the order they are tried.
        kept: Whether the edge stays, ``[n_edges]``; beyond ``position`` what is guessed.
        tried: Whether it was tried: an edge into a component that nobody reads is removed without.
        increase: By how much the distance grew, ``[n_edges]``.
        position: Number of edges decided.
        distance: Of the output with all removed edges removed, mean over pairs.
        window: Edges to try in the next pass; ``widest`` is the most.
        removed: ``[n_sources, n_receivers]``.
    """

    def __init__(self, model: TracedModel, patchers: list[Patcher], threshold: float) -> None:
        import torch

        wiring = model.wiring
        self.model, self.threshold = model, threshold
        self.patchers: Sequence[Patcher] = patchers
        self.edges = wiring.edges[::-1]
        self.kept = torch.zeros(len(self.edges), dtype=torch.bool)
        self.tried = torch.zeros(len(self.edges), dtype=torch.bool)
        self.increase = torch.zeros(len(self.edges), dtype=torch.float64)
        largest = max(patcher.difference[0].nbytes for patcher in patchers)
        self.widest = min(MAX_WINDOW, max(MIN_WINDOW, WINDOW_MEMORY // largest))
        self.window = min(self.widest, 2 * MIN_WINDOW)
        self.position, self.distance = 0, 0.0
        self.removed = torch.zeros(
            len(wiring.sources), len(wiring.receivers), dtype=torch.bool, device=model.device
        )
        columns = {tuple(receiver): i for i, receiver in enumerate(wiring.receivers)}
        self._places = [
            (wiring.source_rows[source], columns[target, port])
            for source, target, port in self.edges
        ]

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to make the same passes."""
        import torch

        return {
            "kept": self.kept,
            "tried": self.tried,
            "increase": self.increase,
            "counts": torch.tensor([self.position, self.window]),
            "distance": torch.tensor(self.distance, dtype=torch.float64),
        }

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Go on from what :meth:`state` gave."""
        if state is None:
            return
        self.kept, self.tried, self.increase = state["kept"], state["tried"], state["increase"]
        self.position, self.window = state["counts"].tolist()
        self.distance = float(state["distance"])
        for number in range(self.position):
            if not self.kept[number]:
                self.removed[self._places[number]] = True

    def steps(self, keep: Callable[[Mapping[str, Tensor]], None]) -> Iterator[Edge]:
        """Decide on every edge that is left; ``keep`` is given the state after each pass."""
        for numbers in self._blocks():
            # Whatever reads a component was decided on in an earlier block.
            read = {self.edges[n].source for n in range(numbers.start) if self.kept[n]} | {"logits"}
            while (first := max(self.position, numbers.start)) < numbers.stop:
                left = [n for n in range(first, numbers.stop) if self.edges[n].target in read]
                if left:
                    self._decide(left[: self.window])
                if not left or self.position > left[-1]:
                    self.position = numbers.stop
                self._remove(first)
                keep(self.state())
                yield from self.edges[first : self.position]

    def _blocks(self) -> Iterator[range]:
        """Numbers of the edges into each block of receivers, in the order they are tried."""
        first = 0
        for block in reversed(list(self.model.wiring.blocks())):
            size = (block.receivers.stop - block.receivers.start) * block.n_sources
            yield range(first, first + size)
            first += size

    def _decide(self, numbers: Sequence[int]) -> None:
        """Try edges in one pass, and decide on them as far as the guesses prove right."""
        import torch

        rows, removed = [], self.removed
        for number in numbers:
            row = removed.clone()
            row[self._places[number]] = True
            rows.append(row)
            removed = removed if self.kept[number] else row
        before, right, first = self.distance, True, self.position
        for number, distance in zip(numbers, self.distances(torch.stack(rows)), strict=True):
            guess, increase = bool(self.kept[number]), distance - before
            self.kept[number] = kept = not increase < self.threshold
            if right:
                self.tried[number], self.increase[number] = True, increase
                self.position = number + 1
                self.distance = self.distance if kept else distance
            right = right and kept == guess
            before = before if guess else distance
        decided = sum(first <= number < self.position for number in numbers)
        wider = 2 * self.window if right else max(MIN_WINDOW, 2 * decided)
        self.window = min(self.widest, wider)

    def _remove(self, first: int) -> None:
        """Note the edges from ``first`` to the position that are not kept."""
        for number in range(first, self.position):
            if not self.kept[number]:
                self.removed[self._places[number]] = True

    def distances(self, masks: Tensor) -> list[float]:
        """Mean distance from the base run with each set of edges removed."""
        moved = [
            (patcher.sets(masks) - patcher.base_score).abs().sum(1) for patcher in self.patchers
        ]
        return _mean(moved, self.patchers)

    def without(self, number: int) -> Tensor:
        """The edges removed, and one more, ``[n_sources, n_receivers]``."""
        mask = self.removed.clone()
        mask[self._places[number]] = True
        return mask


def _circuit(search: _Search, mode: Mode) -> CircuitGraph:
    """The circuit of the edges kept, each scored by the task's metric when it goes too."""
    wiring, patchers = search.model.wiring, search.patchers
    kept = [number for number in range(len(search.edges)) if search.kept[number]][::-1]
    without, *scores = _scores(search, kept, patchers)
    sign = 1 if mode == "noise" else -1
    circuit = circuitlab.CircuitGraph()
    used = {"input", "logits"} | {name for number in kept for name in search.edges[number][:2]}
    for name in (*wiring.sources, "logits"):
        if name in used:
            kind, layer, head = wiring.component(name)
            data = {} if head is None else {"head": head}
            circuit.add_component(name, kind=kind, layer=layer, **data)
    for number, score in zip(kept, scores, strict=True):
        source, target, port = search.edges[number]
        increase = float(search.increase[number])
        circuit.add_effect(source, target, sign * (score - without), port=port, increase=increase)
    circuit.graph["n_edges_total"] = wiring.n_edges
    circuit.graph["score"] = _SCORE[mode]
    circuit.graph["findings"] = {
        **_counts(search, len(kept)),
        **_recovered(patchers, without, mode),
    }
    if len(kept) in (0, wiring.n_edges):
        word, way = ("no", "lower") if not kept else ("every", "raise")
        circuit.graph["warnings"] = [
            f"{word} edge is kept: the threshold {search.threshold:g} does not tell edges apart; "
            f"{way} it with --threshold"
        ]
    return circuit


def _scores(search: _Search, kept: Sequence[int], patchers: Sequence[Patcher]) -> list[float]:
    """The task's metric, mean over pairs: of the circuit, then without each edge kept."""
    import torch

    scores: list[float] = []
    rows = [None, *kept]
    parts = [rows[i : i + MAX_WINDOW] for i in range(0, len(rows), MAX_WINDOW)]
    for part in circuitlab.track(parts, f"ACDC: scoring {len(kept):,} edges"):
        masks = torch.stack([search.removed if n is None else search.without(n) for n in part])
        scores += _mean([patcher.sets(masks).sum(1) for patcher in patchers], patchers)
    return scores


def _mean(sums: Sequence[Tensor], patchers: Sequence[Patcher]) -> list[float]:
    """Means over all pairs, from each batch's sums ``[n]``."""
    n_pairs = sum(map(len, patchers))
    totals = zip(*(batch.tolist() for batch in sums), strict=True)
    return [math.fsum(total) / n_pairs for total in totals]


def _counts(search: _Search, n_kept: int) -> dict[str, str]:
    """What the search went through, in words."""
    n_tried = int(search.tried.sum())
    untried = len(search.edges) - n_tried
    gaps = (search.increase - search.threshold).abs().masked_fill(~search.tried, float("inf"))
    closest = int(gaps.argmin())
    source, target, port = search.edges[closest]
    name = f"{source} → {target}{':' + port if port else ''}"
    return {
        "edges kept": f"{n_kept:,} of {len(search.edges):,}",
        "edges tried": f"{n_tried:,}; the other {untried:,} lead to components that nothing reads",
        "closest decision": f"{name}, {float(search.increase[closest]):.6g} for the threshold "
        f"{search.threshold:g}",
    }


def _recovered(patchers: Sequence[Patcher], score: float, mode: Mode) -> dict[str, str]:
    """Where the circuit's metric stands between that of the other run and that of the base run."""
    (base,) = _mean([patcher.base_score.sum()[None] for patcher in patchers], patchers)
    (other,) = _mean([patcher.other_score.sum()[None] for patcher in patchers], patchers)
    if base == other:
        return {}
    share = round((score - other) / (base - other), 3) + 0.0  # the sum has no -0.0
    names = ("clean", "ablated") if mode == "noise" else ("corrupt", "clean")
    return {
        "effect recovered": f"{share:.1%} of the way from the {names[1]} run ({other:.4g}) to the "
        f"{names[0]} run ({base:.4g})"
    }
