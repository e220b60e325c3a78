"""CircuitGraph: components, the effects between them, and where they came from."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import networkx as nx

from circuitlab.errors import GraphError

SCHEMA = "circuitlab-circuit/1"
#: Largest score in size, so that sums of scores are finite too.
LARGEST_SCORE = 1e100

#: Words of a score where an analysis says nothing else.
EDGE_SCORE = (
    "metric(edge patched) - metric(reference), mean over pairs; negative = the edge helps the task"
)


class CircuitGraph(nx.MultiDiGraph):  # type: ignore[misc]  # networkx has no types
    """A circuit: a ``networkx.MultiDiGraph`` of components and effects, with its provenance.

    * A node is a component: ``input``, ``a9.h6``, ``m5``, ``logits``; its data are at least
      ``kind`` and ``layer``.
    * An edge ``(source, target, key)`` is an effect; ``key`` is the port, ``"q"``, ``"k"``, ``"v"``
      or ``""``; its data are at least ``score``, a float of at most 1e100 in size.
    * ``graph.graph`` is the provenance; ``graph.graph["score"]`` says in words what a score is.

    Every networkx algorithm works on it; copies and subgraphs are CircuitGraphs again.
    """

    def add_component(self, name: str, *, kind: str, layer: int, **data: Any) -> str:
        """Add a component and return its name.

        Args:
            name: Unique; by convention ``input``, ``a{layer}.h{head}``, ``m{layer}``, ``logits``.
            kind: ``input``, ``head``, ``mlp``, ``logits``, or a plugin's own word.
            layer: Block the component belongs to; ``n_layers`` for ``logits``.
            **data: Plain JSON values kept with the node.
        """
        self.add_node(name, kind=kind, layer=layer, **data)
        return name

    def add_effect(
        self, source: str, target: str, score: float, *, port: str = "", **data: Any
    ) -> None:
        """Add the effect of ``source`` on ``target`` through ``port``, replacing an earlier one.

        Args:
            source: A component of the graph.
            target: Another that runs after it.
            score: Finite; see ``graph["score"]`` for its meaning and sign.
            port: ``"q"``, ``"k"``, ``"v"``, or ``""`` where the target has one input.
            **data: Plain JSON values kept with the edge.

        Raises:
            GraphError: an end is not in the graph, or the score is not a finite number.
        """
        for end in (source, target):
            if end not in self:
                raise GraphError(
                    f"effect {effect_name(source, target, port)}: component {end!r} is not in the "
                    f"graph; add it with add_component first"
                )
        value = float(score)
        if not _is_finite(value):
            raise GraphError(
                f"effect {effect_name(source, target, port)} has score {value}; "
                f"a score must be finite, at most {LARGEST_SCORE:g} in size: "
                f"leave an effect out when it was not measured"
            )
        self.add_edge(source, target, key=port, score=value, **data)

    def effects(self) -> Iterator[tuple[str, str, str, float]]:
        """(source, target, port, score) of every effect, strongest first, ties by name."""
        effects = [
            (s, t, str(p), float(d["score"])) for s, t, p, d in self.edges(keys=True, data=True)
        ]
        return iter(sorted(effects, key=lambda e: (-abs(e[3]), e[:3])))

    def top(self, n: int) -> Self:
        """The circuit of the ``n`` strongest effects and the components they join."""
        kept = [(s, t, p) for (s, t, p, _), _ in zip(self.effects(), range(n), strict=False)]
        circuit: Self = self.edge_subgraph(kept).copy()
        return circuit

    def prune(self) -> Self:
        """The circuit without what lies on no path from ``input`` to ``logits``."""
        if "input" not in self or "logits" not in self:
            circuit: Self = self.edge_subgraph([]).copy()
            return circuit
        alive = (nx.descendants(self, "input") | {"input"}) & (
            nx.ancestors(self, "logits") | {"logits"}
        )
        circuit = self.subgraph(alive).copy()
        return circuit

    def validate(self) -> None:
        """Check what every circuit must hold: kinds, layers, finite scores, no cycle.

        Raises:
            GraphError: names the first component or effect that fails, and why.
        """
        for name, data in self.nodes(data=True):
            if not isinstance(name, str):
                raise GraphError(
                    f"component {name!r} is named by a {type(name).__name__}, not a str"
                )
            for field, kind in (("kind", str), ("layer", int)):
                if type(data.get(field)) is not kind:
                    raise GraphError(
                        f"component {name!r} has {field} {data.get(field)!r}; "
                        f"it needs a {kind.__name__}: add components with add_component"
                    )
        for source, target, port, data in self.edges(keys=True, data=True):
            label = effect_name(source, target, str(port))
            if not isinstance(port, str):
                raise GraphError(f"effect {label} has port {port!r}, not a str: use add_effect")
            score = data.get("score")
            if not _is_finite(score):
                raise GraphError(f"effect {label} has score {score!r:.40}; {_FINITE}")
        if not nx.is_directed_acyclic_graph(self):
            cycle = " -> ".join(str(edge[0]) for edge in nx.find_cycle(self))
            raise GraphError(f"the circuit has a cycle: {cycle}; effects must run forward")

    def to_json(self) -> str:
        """The circuit as networkx node-link JSON, one document, keys sorted, no NaN.

        Raises:
            GraphError: a value is NaN, infinite, or not plain JSON.
        """
        try:
            return json.dumps(self.to_document(), allow_nan=False, sort_keys=True, indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise GraphError(f"the circuit cannot be written as JSON: {error}") from error

    def to_document(self) -> dict[str, Any]:
        """The circuit as networkx node-link data, with its ``schema``.

        Raises:
            GraphError: node or edge data have a name that the document needs for itself.
        """
        for name, data in self.nodes(data=True):
            _refuse_names(data, ("id",), f"component {name!r}")
        for source, target, port, data in self.edges(keys=True, data=True):
            where = f"effect {effect_name(source, target, str(port))}"
            _refuse_names(data, ("source", "target", "key", "port"), where)
        return {"schema": SCHEMA, **nx.node_link_data(self, edges="edges")}

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            GraphError: the text is not such a document, or of a version that is not known here.
        """
        try:
            document = load_json(text)
        except ValueError as error:
            raise GraphError(f"not a circuit: {error}") from error
        if not isinstance(document, Mapping) or not {"graph", "nodes", "edges"} <= document.keys():
            raise GraphError(
                "not a circuit: the JSON has no graph, nodes and edges; "
                "a circuit is written by `circuitlab trace --output circuit.json`"
            )
        schema = document.get("schema")
        if schema != SCHEMA:
            raise GraphError(
                f"schema {schema!s:.60} is not {SCHEMA}, the one this version reads; use the "
                f"CircuitLab that wrote the file, or call a file of networkx .node-link.json"
            )
        try:
            plain = nx.node_link_graph(
                {**document, "directed": True, "multigraph": True}, edges="edges"
            )
            circuit = cls(plain)
        except (nx.NetworkXError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise GraphError(f"not a circuit: a node or edge is malformed ({error!r})") from error
        circuit.validate()
        return circuit

    def save(self, path: str | Path) -> None:
        """Write the circuit in the format of the path's suffix, as ``write_circuit`` does.

        Warnings of the format are Python warnings.

        Raises:
            OptionError: the suffix is not known.
            GraphError: the format cannot hold the circuit.
            ResourceError: the file cannot be written there.
        """
        if _writer is None:
            raise GraphError(
                "nothing is loaded that writes circuits; import CircuitGraph from circuitlab"
            )
        for warning in _writer(self, Path(path)):
            warnings.warn(warning, stacklevel=2)

    def explore(self) -> Any:
        """The interactive page of the circuit, as a notebook shows it."""
        if _frame is None:
            raise GraphError(
                "nothing is loaded that shows pages; import CircuitGraph from circuitlab"
            )
        return _frame(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """How a notebook shows the circuit: its picture and a line of text; text where it has none.

        Pictures are there once ``circuitlab.render`` is loaded, as it is by ``circuitlab`` itself.
        """
        text = str(self)
        bundle = {}
        if _picture is not None:
            try:
                bundle["image/svg+xml"] = _picture(self)
            except GraphError as error:
                text = f"{text}, not drawn: {error}"
        # Names come from files of strangers: a terminal receives no control characters.
        bundle["text/plain"] = "".join(c if c.isprintable() else "?" for c in text)
        return bundle


_FINITE = f"it needs a finite number, at most {LARGEST_SCORE:g} in size"

_picture: Callable[[CircuitGraph], str] | None = None


def show_by(picture: Callable[[CircuitGraph], str]) -> None:
    """Show circuits in notebooks by the SVG that ``picture`` gives.

    Drawing stands above this module, so it announces itself here and is not imported.
    """
    global _picture
    _picture = picture


_writer: Callable[[CircuitGraph, Path], list[str]] | None = None
_frame: Callable[[CircuitGraph], Any] | None = None


def save_by(writer: Callable[[CircuitGraph, Path], list[str]]) -> None:
    """Save circuits by ``writer``, which returns warnings; it announces itself as in show_by."""
    global _writer
    _writer = writer


def explore_by(frame: Callable[[CircuitGraph], Any]) -> None:
    """Explore circuits in notebooks by what ``frame`` gives; it announces itself as in show_by."""
    global _frame
    _frame = frame


def load_json(text: str) -> Any:
    """The value of a JSON text all of whose numbers are finite.

    Raises:
        ValueError: not JSON, or a number that is NaN, infinite or too large for a float.
    """
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)


def effect_name(source: str, target: str, port: str = "") -> str:
    """``a0.h1 → a1.h0:k``, the way an effect is written for people."""
    return f"{source} → {target}{':' + port if port else ''}"


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST_SCORE <= value <= LARGEST_SCORE


def _refuse_names(data: Mapping[str, Any], reserved: tuple[str, ...], where: str) -> None:
    for name in reserved:
        if name in data:
            raise GraphError(f"{where} has data {name!r}, a name that files need; rename it")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is too large for a number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; a score must be finite")
