"""Runs of circuits against brute force: the stock model, each receiver's stream put together."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import oracles
import pytest
import torch
from families import random_module, unchecked
from family_oracles import SplitModel
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    Ablation,
    Edge,
    GraphError,
    ModelError,
    OptionError,
    Patcher,
    PromptPair,
    QualityError,
    SiteError,
    Task,
    TaskError,
    TracedModel,
    load_model,
)
from circuitlab.blocks import blocks_only
from circuitlab.evaluation import circuit_runs, circuit_walk
from circuitlab.evaluation.circuit_runs import CircuitRuns

ABLATIONS: tuple[Ablation, ...] = ("counterfactual", "zero", "mean")
TOLERANCES = {"gpt2": 1e-9, "float32": 1e-5, "neox": 1e-5, "gemma2": 1e-5}


class Split(SplitModel):
    """Where all heads of a layer write 0, so does the norm behind them."""

    def written(self, layer: int, z: list[Tensor]) -> tuple[list[Tensor], Tensor | float]:
        parts, constant = super().written(layer, z)
        return [part.nan_to_num(0.0) for part in parts], constant


class Case:
    """A small random model, three pairs of different length, and the oracle on them."""

    def __init__(self, family: str, metric: str = "logit-difference") -> None:
        if family in ("gpt2", "float32"):
            dtype = torch.float64 if family == "gpt2" else torch.float32
            self.module: Any = oracles.random_gpt2(2, 2, 16, seed=3, dtype=dtype)
            self.model = load_model((self.module, None))
        else:
            self.module = random_module(family, seed=2).requires_grad_(False)
            self.model = unchecked(self.module)
        self.pairs = self.model.encode(random_task([6, 3, 5], metric))
        wiring, rng = self.model.wiring, Random(0)
        # With zero all around, the last norm would blow up rounding where nothing else is read.
        direct = Edge("input", "logits")
        self.circuits = [
            {direct, *rng.sample(wiring.edges, round(wiring.n_edges * share))}
            for share in (0, 0.1, 0.3, 0.5, 0.8, 0.97, 1)
        ]
        self.nodes = [
            set(rng.sample(wiring.sources, n)) | {"input"} for n in range(len(wiring.sources))
        ]

    def expected(self, circuits: list[set[Any]], ablation: str) -> Tensor:
        """The metric ``[n, n_pairs]`` with every edge patched that is not kept."""
        removed = [[e for e in self.model.wiring.edges if e not in kept] for kept in circuits]
        if not hasattr(self.module, "transformer"):
            return self._split(removed, ablation)
        clean, mask = self.pairs.clean, self.pairs.clean.mask.long()
        with torch.no_grad():
            reference = oracles.run(self.module, clean.ids, mask).logits[:, -1]
        found = [
            oracles.patched_metric(
                self.module,
                clean.ids,
                self.pairs.corrupt.ids,
                lambda logits: self.pairs.score(logits, reference).double(),
                [tuple(edge) for edge in edges],
                ablation=ablation,
                attention_mask=mask,
            )
            for edges in removed
        ]
        return torch.stack(found)

    @torch.no_grad()
    def _split(self, removed: list[list[Any]], ablation: str) -> Tensor:
        split, mask = Split(self.module), self.pairs.clean.mask
        clean, corrupt = (
            split.run(side.ids, mask.long()) for side in (self.pairs.clean, self.pairs.corrupt)
        )
        other = {
            "counterfactual": corrupt.outputs,
            "zero": {name: torch.zeros_like(x) for name, x in clean.outputs.items()},
            "mean": {name: x[mask].mean(0).expand_as(x) for name, x in clean.outputs.items()},
        }[ablation]
        receivers = list(split.receivers)
        patched = torch.zeros(len(removed), len(split.sources), len(receivers), dtype=torch.bool)
        for number, edges in enumerate(removed):
            for source, target, port in edges:
                column = receivers.index((target, port))
                patched[number, split.sources.index(source), column] = True
        run = split.run(self.pairs.clean.ids, mask.long(), other=other, patched=patched)
        return torch.stack([self.pairs.score(x, clean.logits[0]).double() for x in run.logits])

    def apart(self, found: Tensor, circuits: list[set[Any]], ablation: str) -> float:
        """Largest difference from the oracle, in the size of the logits' differences."""
        known = self.expected(circuits, ablation)
        assert float(known.std(0).min()) > 0.1, "the circuits do not differ"
        return float((found - known).abs().max()) / max(1.0, float(known.abs().max()))


_cases: dict[str, Case] = {}


def case(family: str) -> Case:
    return _cases.setdefault(family, Case(family))


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("family", list(TOLERANCES))
def test_circuits_of_edges(family: str, ablation: Ablation) -> None:
    """Every edge outside a circuit carries the ablated output, all else is recomputed."""
    c = case(family)
    runs = CircuitRuns(c.model, c.pairs, ablation=ablation, batch_size=2)
    assert c.apart(runs.metric(c.circuits), c.circuits, ablation) < TOLERANCES[family]
    assert torch.equal(runs.metric(c.circuits[:0]), torch.zeros(0, 3, dtype=torch.float64))


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("family", list(TOLERANCES))
def test_circuits_of_components(family: str, ablation: Ablation) -> None:
    """A component outside a circuit has all of its outgoing edges patched."""
    c = case(family)
    runs = CircuitRuns(c.model, c.pairs, ablation=ablation, level="node", batch_size=2)
    edges = [{e for e in c.model.wiring.edges if e.source in names} for names in c.nodes]
    assert c.apart(runs.metric(c.nodes), edges, ablation) < TOLERANCES[family]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_whole_and_empty(ablation: Ablation) -> None:
    """The whole circuit is the stock model; the empty one has every edge patched."""
    c = case("gpt2")
    for level in ("edge", "node"):
        runs = CircuitRuns(c.model, c.pairs, ablation=ablation, level=cast(Any, level))
        for found, kept in ((runs.whole, set(c.model.wiring.edges)), (runs.empty, set[Any]())):
            assert float((found - c.expected([kept], ablation)[0]).abs().max()) < 1e-9
        for check in runs.checks.values():
            assert check["difference"] < 1e-9 < 1e-8 > check["tolerance"] > 0
    with torch.no_grad():
        clean, corrupt = (
            c.module(x.ids, attention_mask=x.mask.long(), position_ids=x.position_ids).logits[:, -1]
            for x in (c.pairs.clean, c.pairs.corrupt)
        )
    assert float((runs.whole - c.pairs.score(clean, clean)).abs().max()) < 1e-9
    if ablation == "counterfactual":
        assert float((runs.empty - c.pairs.score(corrupt, clean)).abs().max()) < 1e-9


def test_metrics_of_all_logits() -> None:
    """The divergence is taken from what the model says on the clean prompt."""
    c = Case("gpt2", "kl-divergence")
    runs = CircuitRuns(c.model, c.pairs, ablation="zero", batch_size=1)
    assert c.apart(runs.metric(c.circuits), c.circuits, "zero") < 1e-9
    assert float(runs.whole.abs().max()) < 1e-12 < 0.1 < float(-runs.empty.max())


def test_masks_are_circuits() -> None:
    """A mask says what is kept: sources by receivers, or sources at level node."""
    c = case("gpt2")
    wiring = c.model.wiring
    masks = torch.zeros(len(c.circuits), len(wiring.sources), len(wiring.receivers)).bool()
    for mask, kept in zip(masks, c.circuits, strict=True):
        for source, target, port in kept:
            names = [tuple(receiver) for receiver in wiring.receivers]
            mask[wiring.sources.index(source), names.index((target, port))] = True
    runs = CircuitRuns(c.model, c.pairs)
    assert torch.equal(runs.metric(masks), runs.metric(c.circuits))
    nodes = torch.tensor([[name in names for name in wiring.sources] for names in c.nodes])
    runs = CircuitRuns(c.model, c.pairs, level="node")
    assert torch.equal(runs.metric(nodes), runs.metric(c.nodes))
    assert torch.equal(runs.metric([*c.nodes[:1], {"logits"}])[1], runs.metric([set[str]()])[0])


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_circuits_do_not_influence_one_another(
    ablation: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, together, walked one by one, and with nothing held between calls: the same metric."""
    c = case("gpt2")
    runs = CircuitRuns(c.model, c.pairs, ablation=ablation)
    together = runs.metric(c.circuits)
    alone = torch.cat([runs.metric([kept]) for kept in c.circuits])
    assert float((together - alone).abs().max()) < 1e-9
    monkeypatch.setattr(circuit_walk, "TOGETHER", {"cuda": 1})
    monkeypatch.setattr(circuit_runs, "HELD", 0)
    anew = CircuitRuns(c.model, c.pairs, ablation=ablation, batch_size=1)
    assert float((anew.metric(c.circuits) - together).abs().max()) < 1e-9
    assert float((anew.metric(c.circuits) - together).abs().max()) < 1e-9


def test_what_makes_no_difference_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges that nothing of the prompt reaches, or that do not reach the logits, cost nothing."""
    c = case("gpt2")
    runs = CircuitRuns(c.model, c.pairs)
    later = {e for e in c.model.wiring.edges if e.source != "input"}
    unread = {e for e in c.model.wiring.edges if e.target != "logits"}
    direct = {e for e in c.model.wiring.edges if e.target == "logits"}
    expected = c.expected([later, unread, direct], "counterfactual")
    monkeypatch.setattr(Patcher, "attention", None)
    monkeypatch.setattr(Patcher, "mlp", None)
    found = runs.metric([later, unread, direct])
    assert float((found - expected).abs().max()) < 1e-9
    assert float((found[2] - found[0]).abs().max()) > 0.1


def test_a_walk_that_goes_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose whole circuit is not the model are not handed out."""
    c, right = case("gpt2"), Patcher.mlp
    wrong = 0.01 * torch.arange(16)
    monkeypatch.setattr(Patcher, "mlp", lambda self, *given: wrong + right(self, *given))
    with pytest.raises(
        QualityError, match=r"the metric of the whole circuit is off by 0\.\d+"
    ) as e:
        CircuitRuns(c.model, c.pairs)
    assert e.value.exit_code == 7


def test_what_cannot_be_run() -> None:
    """Other words, unknown edges and components, wrong masks and prompts are named."""
    c = case("gpt2")

    def refused(error: type[Exception], words: str, **how: Any) -> None:
        with pytest.raises(error, match=words):
            CircuitRuns(how.pop("model", c.model), how.pop("pairs", c.pairs), **how)

    refused(OptionError, "level 'head' does not exist; use edge or node", level="head")
    refused(OptionError, "use counterfactual or zero or mean", ablation="corrupt")
    pair = PromptPair((1, 2, 3), (1, 2), (4,), (5,))
    uneven = c.model.encode(Task("uneven", (pair,), align="pad"))
    refused(TaskError, "do not correspond", pairs=uneven)
    unknown = TracedModel(c.module, None, blocks_only(c.module), name="toy")
    refused(ModelError, "no plugin describes family", model=unknown)
    edges, nodes = (CircuitRuns(c.model, c.pairs, level=cast(Any, x)) for x in ("edge", "node"))
    with pytest.raises(GraphError, match="edge m1 -> m0 does not exist"):
        edges.metric([{("m1", "m0", "")}])
    with pytest.raises(GraphError, match=r"component 'a7\.h0' does not exist"):
        nodes.metric([{"a7.h0"}])
    with pytest.raises(SiteError, match=r"give bool and \[n_circuits, n_sources\], here"):
        nodes.metric(torch.ones(1, 3).bool())
    with pytest.raises(SiteError, match="masks of edges have type"):
        edges.metric(torch.ones(1, 3).bool())
