"""Plots: the panels of a circuit, drawn. The only part of CircuitLab that imports matplotlib."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab.errors import OptionError, ResourceError
from circuitlab.panels import panels_of

if TYPE_CHECKING:
    from circuitlab.graph import CircuitGraph

#: Suffixes of plots, as exporters know them.
SUFFIXES = (".plot.svg", ".plot.png", ".plot.pdf")

#: Dots per inch, and dots along the longer side at most: a page of many panels is coarser.
_DPI, _LONGEST = 200, 16_000
#: Nothing in a file says when or by what it was made.
_METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@dataclass(frozen=True)
class Picture:
    """Drawn panels; a notebook shows them.

    Attributes:
        svg: The picture as one ``<svg>`` element, safe to stand inside an HTML page.
    """

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg


def show_plots(circuit: CircuitGraph) -> Picture:
    """The panels of a circuit as a picture for notebooks.

    Raises:
        OptionError: the circuit has no panels.
        GraphError: its panels do not have the form that panels give them.
        ResourceError: matplotlib is not installed.
    """
    text = _drawn(circuit, "svg", "the picture").decode()
    return Picture(text[text.index("<svg") :])


def plot(circuit: CircuitGraph, path: Path) -> None:
    """Draw the panels in ``circuit.graph["plots"]``, up to three side by side.

    The same circuit gives the same bytes.

    Args:
        circuit: What an analysis gave.
        path: Where to; the suffix says the format: ``.svg .png .pdf``.

    Raises:
        OptionError: another suffix, or the circuit has no panels.
        GraphError: its panels do not have the form that panels give them.
        ResourceError: matplotlib is not installed, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix[1:] not in _METADATA:
        raise OptionError(f"plot {path.name!r} has suffix {suffix!r}; plots are .svg, .png, .pdf")
    content = _drawn(circuit, suffix[1:], f"plot {path.name!r}")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ResourceError(
            f"plot {path.name!r} cannot be written: {error.strerror}; "
            f"check free space and permissions of its folder"
        ) from error


def check_installed(what: str) -> None:
    """Refuse to draw where nothing can.

    Raises:
        ResourceError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ResourceError(f"{what} needs matplotlib; run `pip install circuitlab[plots]`")


def _drawn(circuit: CircuitGraph, form: str, what: str) -> bytes:
    panels = panels_of(circuit)
    if not panels:
        raise OptionError(
            "the circuit has nothing to plot: its analysis added no panels; draw its diagram with "
            ".svg, .png or .pdf, or run one that does, as `circuitlab trace path-patching`"
        )
    check_installed(what)
    from circuitlab.plots.page import compose, settings

    content = io.BytesIO()
    with settings():
        figure = compose(circuit, panels)
        dpi = min(_DPI, _LONGEST / max(figure.get_size_inches()))
        figure.savefig(content, format=form, dpi=dpi, metadata=_METADATA[form])
    return content.getvalue()
