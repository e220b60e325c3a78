"""Frame: a page inside a notebook, in a frame that can reach nothing outside itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from circuitlab.graph import CircuitGraph
from circuitlab.page.document import compose


@dataclass(frozen=True)
class Frame:
    """A page that a notebook shows.

    Attributes:
        html: The whole document.
        height: Of the frame, in pixels.
    """

    html: str
    height: int = 640

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox="allow-scripts" width="100%" height="{self.height}" '
            f'frameborder="0" title="Circuit" srcdoc="{escape(self.html, quote=True)}"></iframe>'
        )


def frame(
    circuit: CircuitGraph,
    *,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    other: CircuitGraph | None = None,
    height: int = 640,
) -> Frame:
    """The circuit's page for a notebook; see :func:`circuitlab.page.compose`.

    Raises:
        GraphError: a circuit, or details, are not well formed.
    """
    return Frame(compose(circuit, details=details, other=other), height)
