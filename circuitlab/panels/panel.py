"""Panel: what every kind of panel is, and a rule that several of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from circuitlab.plain import Record

if TYPE_CHECKING:
    from circuitlab.graph import CircuitGraph


@dataclass(frozen=True, kw_only=True)
class Panel(Record):
    """One plot of a circuit's measurements.

    Attributes:
        title: Its heading.
        caption: How to read it; lines are broken where they do not fit.
    """

    title: str
    caption: str = ""

    kind: ClassVar[str]

    def add_to(self, circuit: CircuitGraph) -> None:
        """Append the panel to ``circuit.graph["plots"]``, as plain JSON."""
        circuit.graph.setdefault("plots", []).append(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The panel as plain JSON: its ``kind`` and its fields, without those left at default."""
        return {"kind": self.kind, **super().to_json()}


def both_or_none(lo: object, hi: object) -> None:
    """Refuse an interval of one end.

    Raises:
        ValueError: one of the two is missing.
    """
    if (lo is None) != (hi is None):
        raise ValueError("an interval has two ends; give lo and hi, or neither")
