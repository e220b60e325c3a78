"""The published protocols, each as its authors ran it, under its own label.

They ask different things and their numbers do not compare: paths between two real activations,
pushes of real and of synthetic ones; distances of final streams, of logits, divergences of
predictions. Where the code beside a paper has a defect it is not repeated; each protocol says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from circuitlab import Curves, OptionError, SiteError, TaskError, TextTable, track
from circuitlab_activation_plateaus.protocols import measures
from circuitlab_activation_plateaus.protocols.measures import REACH, Job, Measured, Number
from circuitlab_activation_plateaus.walks.pairs import make_bank

if TYPE_CHECKING:
    from circuitlab import CircuitGraph, Dictionary, Site, Task, TracedModel
    from circuitlab_activation_plateaus.walks.pairs import Bank


@dataclass(frozen=True)
class Protocol:
    """A published way to ask.

    Attributes:
        name: Its option value.
        authors: With the year.
        citation: Where it is published.
        asks: Path and response in a line.
        pairs: Kind of its bank.
        headline: Words of the numbers that are told first.
        differs: What is done otherwise than in the authors' code, and why.
        measure: Does it.
    """

    name: str
    authors: str
    citation: str
    asks: str
    pairs: str
    headline: str
    differs: str
    measure: Callable[[Job], Measured]

    @property
    def label(self) -> str:
        """``Janiak et al. 2024 (arXiv:2409.17113)``."""
        return f"{self.authors} ({self.citation})"


@dataclass(frozen=True)
class ProtocolResult:
    """A protocol and what it gave on ``n_pairs`` pairs of a kind."""

    protocol: Protocol
    measured: Measured
    kind: str
    n_pairs: int


#: By option value.
PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "janiak",
            "Janiak et al. 2024",
            "arXiv:2409.17113",
            "straight line after the first layer; relative distance of the final stream",
            "unrelated",
            "final stream: max slope",
            "prompts are the bank's, not ten tokens of books",
            measures.janiak,
        ),
        Protocol(
            "shinkle",
            "Shinkle and Heimersheim 2025",
            "LessWrong WMfSbt7AAcJdHzysB",
            "arc between prompts equal but for the last token; symmetric distance at every site",
            "last-token",
            "logits: ",
            "their code takes the angle from the absolute cosine, which bends the path of obtuse "
            "pairs, and gives no number for parallel ones: here the arc is exact; logits are "
            "centred",
            measures.shinkle,
        ),
        Protocol(
            "heimersheim",
            "Heimersheim and Mendel 2024",
            "LessWrong LajDyGyiyX8DNNsuF",
            "pushes from real and from normal centres; KL by length, L2 at half and at full length",
            "last-token",
            "L2 half",
            "their random baseline (randn - x) contains minus the activation and mostly shrinks "
            "it: here random directions are isotropic",
            measures.heimersheim,
        ),
        Protocol(
            "lee",
            "Lee and Heimersheim 2024",
            "arXiv:2410.12555",
            "directions of equal length that do not depend on the activation; KL by length",
            "last-token",
            "length to",
            "their code overwrites the covariance sample by an isotropic one and shares one draw "
            "over a batch: here each row has its own, with the covariance",
            measures.lee,
        ),
        Protocol(
            "giglemiani",
            "Giglemiani et al. 2024",
            "arXiv:2409.15019",
            "real and synthetic centres pushed towards real activations; L2 of the final stream",
            "last-token",
            "flat at",
            "lengths are in mean norms, not absolute",
            measures.giglemiani,
        ),
    )
}


def run_protocol(
    name: str,
    model: TracedModel,
    bank: Bank,
    site: Site,
    *,
    dictionary: Dictionary | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> ProtocolResult:
    """Run one protocol.

    Args:
        name: One of :data:`PROTOCOLS`.
        model: Any traced model.
        bank: Pairs; of the kind that the protocol names, to be what was published.
        site: The stream that is replaced; ``janiak`` and ``giglemiani`` take that after the first
            layer whatever this is.
        dictionary: An autoencoder of that stream, without which its centres and directions are left
            out.
        seed: Of draws and intervals.
        batch_size: Steps per pass; None chooses.

    Raises:
        OptionError: the name is unknown, or the protocol cannot be run on this model.
        SiteError: the dictionary belongs to another site.
        NumericsError: logits are not finite.
    """
    if name not in PROTOCOLS:
        raise OptionError(f"--protocol {name!r} is unknown; use {', '.join(PROTOCOLS)}, or all")
    protocol = PROTOCOLS[name]
    measured = protocol.measure(Job(model, bank, site, dictionary, seed, batch_size))
    return ProtocolResult(protocol, measured, bank.kind, len(bank))


def add_protocols(
    circuit: CircuitGraph,
    model: TracedModel,
    task: Task | None,
    site: Site,
    *,
    names: Sequence[str],
    n_pairs: int,
    dictionary: Dictionary | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[ProtocolResult]:
    """Run protocols, each on pairs of its own kind, and tell what they give in a circuit.

    Puts into the circuit: ``graph["protocols"]``, a finding for each, a panel of curves for each
    under its label, and one table. Of several, one that cannot be run on the model is left out with
    a warning.

    Args:
        circuit: What is added to.
        model: Any traced model.
        task: For prompts, where the model has no texts of its own.
        site: See :func:`run_protocol`, as the rest.
        names: Some of :data:`PROTOCOLS`.
        n_pairs: Pairs of each bank, at most.
        dictionary: An autoencoder of the stream.
        seed: Of pairs, draws and intervals.
        batch_size: Steps per pass.

    Raises:
        OptionError: a single protocol cannot be run on this model.
        SiteError: the dictionary belongs to another site than a single protocol takes.
        TaskError: a single protocol has no pairs of its kind.
    """
    found = []
    for name in track(names, "published protocols"):
        try:
            bank = make_bank(model, task, PROTOCOLS[name].pairs, n_pairs, seed)
            result = run_protocol(
                name, model, bank, site, dictionary=dictionary, seed=seed, batch_size=batch_size
            )
        except (OptionError, SiteError, TaskError) as error:
            if len(names) == 1:
                raise
            circuit.graph.setdefault("warnings", []).append(f"protocol {name} is left out: {error}")
            continue
        found.append(result)
    for result in found:
        _tell(circuit, result)
    if found:
        _table(found).add_to(circuit)
    return found


def _tell(circuit: CircuitGraph, result: ProtocolResult) -> None:
    protocol, measured = result.protocol, result.measured
    rows = [_plain(number) for number in measured.numbers]
    circuit.graph.setdefault("protocols", {})[protocol.name] = {
        "label": protocol.label,
        "asks": protocol.asks,
        "differs": protocol.differs,
        "pairs": result.kind,
        "n_pairs": result.n_pairs,
        "note": measured.note,
        "numbers": rows,
    }
    told = [number for number in measured.numbers if protocol.headline in number.name]
    first = "; ".join(f"{number.name} {_text(number)}" for number in told)
    circuit.graph.setdefault("findings", {})[f"protocol {protocol.name}"] = first
    lines = [f"{protocol.asks}; {result.n_pairs} pairs ({result.kind})", protocol.differs]
    lines += [measured.note] if measured.note else []
    Curves(
        title=protocol.label,
        caption=" ".join(f"{line[0].upper()}{line[1:]}." for line in lines),
        x=measured.x,
        x_label=measured.x_label,
        y_label=measured.y_label,
        curves=measured.curves,
    ).add_to(circuit)


def _plain(number: Number) -> dict[str, Any]:
    """A number without what lies beyond the longest push."""
    low, high = number.interval or (math.inf, math.inf)
    found = {"median": number.value, "lo": low, "hi": high}
    measured = {name: value for name, value in found.items() if math.isfinite(value)}
    return {"name": number.name, "n": number.n, **measured}


def _text(number: Number) -> str:
    def text(value: float) -> str:
        return f"{value:.3g}" if math.isfinite(value) else f"> {REACH:g}"

    if number.interval is None:
        return text(number.value)
    return f"{text(number.value)} [{', '.join(map(text, number.interval))}]"


def _table(results: Sequence[ProtocolResult]) -> TextTable:
    return TextTable(
        title="Published protocols",
        caption=(
            f"Medians over pairs, 95 % intervals; > {REACH:g}: beyond the longest push. Each asks "
            f"something else: numbers of different protocols do not compare."
        ),
        header=["protocol", "published", "number", "median", "pairs"],
        rows=[
            [
                result.protocol.authors,
                result.protocol.citation,
                number.name,
                _text(number),
                number.n,
            ]
            for result in results
            for number in result.measured.numbers
        ],
    )
