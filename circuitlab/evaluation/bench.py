"""Bench: what all sections of an evaluation measure on, each thing made once, when first used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from circuitlab import baseline
from circuitlab.errors import CircuitLabError, OptionError, PluginError, TaskError
from circuitlab.evaluation.circuit_runs import CircuitRuns
from circuitlab.evaluation.completeness import Completeness, completeness
from circuitlab.evaluation.faithfulness import Faithfulness, faithfulness
from circuitlab.evaluation.kept import Level, kept_edges, kept_nodes
from circuitlab.evaluation.random_circuits import RandomControl, random_control
from circuitlab.evaluation.stability import RESAMPLES, Stability, rediscovered, stability
from circuitlab.evaluation.subject import recorded_analysis, rediscovery
from circuitlab.progress import unwarned
from circuitlab.registry import describe
from circuitlab.wiring import Edge, Receiver

if TYPE_CHECKING:
    from circuitlab.baseline import Baseline
    from circuitlab.evaluation.held_out import HeldOut
    from circuitlab.evaluation.subject import Subject
    from circuitlab.graph import CircuitGraph
    from circuitlab.prompts import EncodedTask

#: Weights of a model up to which hundreds of circuits are run unasked.
SMALL = 5_000_000
#: Seconds of finding a circuit again that are not spent unasked.
DEAR = 120.0


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        level: What the circuit is a set of.
        n_controls: Random circuits.
        resamples: Of each interval.
        quick: Whether only the cheap is measured.
        thorough: Whether the dear is measured too.
        seed: Of all that is drawn.
        batch_size: Pairs per pass; None chooses by memory.
    """

    level: Level = "edge"
    n_controls: int = 100
    resamples: int = 2000
    quick: bool = False
    thorough: bool = False
    seed: int = 0
    batch_size: int | None = None


@dataclass(frozen=True)
class Bench:
    """What all sections measure on; each thing is made when first used, and once."""

    subject: Subject
    held_out: HeldOut
    settings: Settings

    @property
    def circuit(self) -> CircuitGraph:
        """The circuit that is scored."""
        return self.held_out.circuit

    @cached_property
    def pairs(self) -> EncodedTask:
        """The held-out pairs."""
        return self.subject.model.encode(self.held_out.task)

    @cached_property
    def measured(self) -> Baseline:
        """What the model does on them."""
        return baseline.measure(self.subject.model, self.pairs)

    @cached_property
    def kept(self) -> frozenset[Any]:
        """Edges, or components, that the circuit keeps."""
        keep = kept_edges if self.settings.level == "edge" else kept_nodes
        kept: frozenset[Any] = keep(self.circuit, self.subject.model.wiring)
        return kept

    @cached_property
    def runs(self) -> CircuitRuns:
        """Runs circuits on the held-out pairs."""
        return CircuitRuns(
            self.subject.model,
            self.pairs,
            ablation=self.subject.ablation,
            level=self.settings.level,
            batch_size=self.settings.batch_size,
        )

    @cached_property
    def metric(self) -> Tensor:
        """Metric of the circuit on each pair, ``[n_pairs]``."""
        return self.runs.metric([self.kept])[0]

    @cached_property
    def faithfulness(self) -> Faithfulness:
        """Of the circuit."""
        return self.share_of(self.metric)

    @cached_property
    def control(self) -> RandomControl:
        """The circuit among random ones.

        Raises:
            TaskError: its own faithfulness is not defined.
        """
        self.needs_effect()
        value = cast("float", self.faithfulness.value)
        n, seed = self.settings.n_controls, self.settings.seed
        return random_control(self.runs, self.kept, value, n=n, seed=seed)

    @cached_property
    def completeness(self) -> Completeness:
        """What the model does without the circuit, and both without the same components.

        Raises:
            TaskError: the circuit's faithfulness is not defined.
        """
        self.needs_effect()
        return completeness(
            self.runs, self.kept, seed=self.settings.seed, resamples=self.settings.resamples
        )

    @cached_property
    def pair_scores(self) -> Tensor:
        """The analysis's scores of each pair it was found on, ``[n, n_sources, n_receivers]``.

        Raises:
            OptionError: there are none.
            PluginError: the analysis fails, or gives something else.
        """
        found = recorded_analysis(self.circuit, self.subject.registry)
        if found is None:
            raise OptionError("the analysis that found it is not installed")
        if found[0].pair_scores is None:
            raise OptionError(
                f"analysis {found[0].name!r} does not offer the scores of single pairs "
                f"(pair_scores in its plugin)"
            )
        if self.held_out.source is None:
            raise OptionError("the pairs it was found on are not at hand")
        analysis, options = found
        pairs = self.subject.model.encode(self.held_out.source)
        owner = f"pair_scores of analysis {analysis.name!r} of plugin {analysis.plugin!r}"
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.settings.seed)
                scores = cast("Any", analysis.pair_scores)(self.subject.model, pairs, **options)
        except CircuitLabError:
            raise
        except Exception as error:  # a plugin may raise anything
            raise PluginError(f"{owner} failed: {describe(error)}") from error
        wiring = self.subject.model.wiring
        shape = [len(pairs), len(wiring.sources), len(wiring.receivers)]
        if not isinstance(scores, Tensor) or list(scores.shape) != shape:
            given = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PluginError(f"{owner} gave {given}, not scores of shape {shape}")
        return scores.double().cpu()

    @cached_property
    def scores(self) -> Tensor:
        """Scores of all edges, ``[n_sources, n_receivers]``: the circuit's own where it has all.

        Raises:
            OptionError: there are none.
        """
        wiring, circuit = self.subject.model.wiring, self.circuit
        known = [
            Edge(s, t, p) for s, t, p, d in circuit.edges(keys=True, data=True) if "kind" not in d
        ]
        if set(known) != set(wiring.edges):
            return self.pair_scores.mean(0)
        table = torch.zeros(len(wiring.sources), len(wiring.receivers), dtype=torch.float64)
        for edge in known:
            column = wiring.receiver_columns[Receiver(edge.target, edge.port)]
            table[wiring.source_rows[edge.source], column] = circuit.edges[tuple(edge)]["score"]
        return table

    @cached_property
    def again(self) -> Callable[[list[int]], CircuitGraph] | None:
        """Finds the circuit again on chosen pairs of those it was found on; None if it cannot."""
        source, find = self.held_out.source, rediscovery(self.subject)
        if source is None or find is None:
            return None

        def on(rows: list[int]) -> CircuitGraph:
            with unwarned():  # a resample repeats pairs, as it should
                return find(replace(source, pairs=tuple(source.pairs[row] for row in rows)))

        return on

    @cached_property
    def stability(self) -> Stability:
        """How often resamples of the pairs give the same edges.

        Raises:
            OptionError: the circuit cannot be found again, or only at a price that was not asked.
        """
        wiring, seed = self.subject.model.wiring, self.settings.seed
        kept = kept_edges(self.circuit, wiring)
        found = recorded_analysis(self.circuit, self.subject.registry)
        if found is not None and "top" in found[1]:
            with suppress(OptionError):
                top, threshold = found[1]["top"], found[1].get("threshold")
                return stability(
                    wiring, kept, self.pair_scores, top=top, threshold=threshold, seed=seed
                )
        if self.again is None or self.held_out.source is None:
            raise OptionError("it cannot be found again on other draws of the pairs")
        if self.settings.quick:
            raise OptionError("running its analysis again is left out by --quick")
        each = self.circuit.graph.get("seconds")
        seconds = RESAMPLES * (each if isinstance(each, int | float) else 0.0)
        if seconds > DEAR and not self.settings.thorough:
            raise OptionError(
                f"its analysis would run {RESAMPLES} times, about {seconds:.0f} s; ask for it by "
                f"--thorough"
            )
        n_pairs = len(self.held_out.source.pairs)
        return rediscovered(wiring, kept, self.again, n_pairs, seed=seed)

    def share_of(self, metric: Tensor) -> Faithfulness:
        """Faithfulness of a circuit by its metric on each pair."""
        return faithfulness(
            metric, self.runs.whole, self.runs.empty,
            seed=self.settings.seed, resamples=self.settings.resamples,
        )  # fmt: skip

    def needs_effect(self) -> None:
        """Refuse shares of an effect that may be 0.

        Raises:
            TaskError: the faithfulness is not defined.
        """
        if self.faithfulness.value is None:
            raise TaskError(f"the faithfulness is not defined: {self.faithfulness.reason}")

    def needs_time(self, what: str) -> None:
        """Refuse what runs hundreds of circuits, where that is dear and was not asked for.

        Raises:
            OptionError: says what to ask for.
        """
        if self.settings.quick:
            raise OptionError(f"{what} is left out by --quick")
        if self.subject.model.n_parameters > SMALL and not self.settings.thorough:
            raise OptionError(f"{what} runs hundreds of circuits; ask for it by --thorough")
