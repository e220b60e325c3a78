"""Plots of a circuit's measurements: quadrants, gates, dose–response, heat map, hypotheses.

Drawn by matplotlib's own canvases, never its global state: the same circuit gives the same bytes.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab import OptionError, ResourceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from circuitlab import CircuitGraph

#: Suffixes that :func:`plot` knows.
SUFFIXES = (".svg", ".png", ".pdf")

_DPI = 200
#: Nothing in a file says when or by what it was made.
_METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
#: Inches for the picture's title, for the line of its verdict, and for each panel's caption.
_HEAD, _VERDICT, _FOOT = 0.5, 0.2, 0.62


def plot(circuit: CircuitGraph, path: Path) -> None:
    """Draw every panel that the circuit has data for, side by side.

    * noise × denoise: effects with ``noise`` and ``denoise``, and the gates of ``graph["gates"]``;
    * mixtures and dividends of gates with at most four members;
    * dose–response curves, ``graph["doses"]``;
    * a heat map, ``graph["heatmap"]``;
    * shares explained by path hypotheses, ``graph["hypotheses"]``.

    Args:
        circuit: What an analysis gave.
        path: Where to; the suffix says the format: ``.svg .png .pdf``.

    Raises:
        OptionError: another suffix, or the circuit has none of these data.
        GraphError: the data do not have the form that the analyses give them.
        ResourceError: matplotlib is not installed, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(
            f"plot {path.name!r} has suffix {suffix!r}; plots are {', '.join(SUFFIXES)}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ResourceError(
            f"plot {path.name!r} needs matplotlib; run `pip install circuitlab[plots]`"
        )
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context():
        # Not the reader's own settings: text of strangers must never reach TeX.
        matplotlib.rcdefaults()
        settings: Any = _style()
        matplotlib.rcParams.update(settings)
        figure = _compose(circuit)
        figure.savefig(content, format=suffix[1:], dpi=_DPI, metadata=_METADATA[suffix])
    try:
        path.write_bytes(content.getvalue())
    except OSError as error:
        raise ResourceError(
            f"plot {path.name!r} cannot be written: {error.strerror}; "
            f"check free space and permissions of its folder"
        ) from error


def _style() -> dict[str, Any]:
    from circuitlab_path_patching.plots.ink import FONT, INK, SOFT

    return {
        "font.family": FONT,
        "font.size": 8.5,
        "text.parse_math": False,
        "text.color": INK,
        "axes.edgecolor": "#888888",
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "axes.formatter.use_mathtext": False,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "svg.hashsalt": "circuitlab",
        "savefig.facecolor": "white",
    }


def _compose(circuit: CircuitGraph) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from circuitlab_path_patching.plots.ink import INK, RED, SOFT, readable
    from circuitlab_path_patching.plots.panels import panels
    from circuitlab_path_patching.plots.quadrants import quadrants

    found = [*quadrants(circuit), *panels(circuit)]
    if not found:
        raise OptionError(
            "the circuit has nothing to plot: no effects in both directions, gates, doses, heat "
            "map or hypotheses; draw its diagram with .svg, .png or .pdf, or run "
            "`circuitlab trace path-patching --mode both`"
        )
    inner = max(panel.height for panel in found) + _FOOT
    doubtful = circuit.graph.get("verdict") == "not established"
    head = _HEAD + (_VERDICT if doubtful else 0.0)
    width, height = sum(panel.width for panel in found), head + inner
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    words = [circuit.graph.get(key) for key in ("model", "task", "metric")]
    title = " · ".join(_word(word) for word in words if word)
    figure.text(0.3 / width, 1 - 0.34 / height, title, size=12, weight="bold", color=INK)
    if doubtful:
        reason = readable(circuit.graph.get("verdict_reason") or "no reason was recorded", 150)
        figure.text(
            0.3 / width, 1 - 0.56 / height, f"NOT ESTABLISHED: {reason}", color=RED, weight="bold"
        )
    widths = [panel.width for panel in found]
    parts = figure.subfigures(
        2, len(found), squeeze=False, wspace=0, hspace=0, width_ratios=widths,
        height_ratios=(head, inner),
    )  # fmt: skip
    for panel, part in zip(found, parts[1], strict=True):
        left = 0.3 / panel.width
        part.text(left, 1 - 0.2 / inner, panel.title, size=10, color=INK)
        part.text(
            left, 0.16 / inner, panel.caption, size=7.5, color=SOFT, va="bottom", linespacing=1.35
        )
        panel.draw(part, (0.0, _FOOT / inner, 1.0, 1 - 0.34 / inner))
    return figure


def _word(value: object) -> str:
    from circuitlab_path_patching.plots.ink import readable

    if isinstance(value, dict):
        value = value.get("name", "")
    return readable(value, 60)
