"""Circuits of paths, of senders and receivers, and of hypotheses: what was measured, as edges."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from circuitlab import CircuitGraph, Edge, OptionError
from circuitlab_path_patching.effects import Setting, Top, empty_circuit, kept_rows
from circuitlab_path_patching.measures import effect_text, stronger, strongest
from circuitlab_path_patching.paths.effects import LIMIT, PathEffects, named_paths, strongest_paths
from circuitlab_path_patching.paths.hypotheses import check_hypotheses, write_hypotheses
from circuitlab_path_patching.paths.language import (
    Path,
    parse_components,
    parse_paths,
    parse_receivers,
)
from circuitlab_path_patching.paths.senders import Mediate, measure_senders

if TYPE_CHECKING:
    from circuitlab_path_patching.paths.hypothesis_files import Hypothesis

#: Path strings that an edge of the circuit names.
NAMED = 3
#: Paths or edges that the result table names.
SHOWN = 5

_EITHER = "of two modes the one in which it does more; negative = helps the task"
PATH_SCORE = (
    f"metric with the path's corrupt value - metric with its clean value, mean over pairs, of the "
    f"strongest path through the edge; {_EITHER}"
)
SENDER_SCORE = (
    f"metric with what the sender's corrupt output changes in what the receiver reads - metric "
    f"with its clean value, mean over pairs; no head between them answers; {_EITHER}"
)


def path_circuit(
    setting: Setting,
    *,
    path: str | None = None,
    senders: str | None = None,
    max_hops: int | None = None,
    top: Top = "all",
    threshold: float | None = None,
) -> CircuitGraph:
    """Paths patched alone, and the edges of the strongest.

    Args:
        setting: What is measured.
        path: The paths, in the path language; None searches, see
            :func:`circuitlab_path_patching.paths.effects.strongest_paths`.
        senders: Where the paths of a search begin; None is ``input``.
        max_hops: Most steps of a path of a search.
        top: How many paths to keep, by absolute score.
        threshold: Keep paths of at least this absolute score.

    Returns:
        Edges with ``score``, ``interval`` and effects in each mode of the strongest path through
        them, and ``paths``, the strongest of these. ``graph["paths"]`` has ``path``, ``score`` and
        ``interval`` of each path kept, strongest first.

    Raises:
        OptionError: a path or sender does not exist, or options exclude one another.
    """
    wiring = setting.model.wiring
    if path is None:
        names = parse_components(senders, wiring) if senders else ["input"]
        found = strongest_paths(setting, senders=names, max_hops=max_hops)
    elif senders is not None or max_hops is not None:
        raise OptionError(
            "--senders and --max-hops say which paths to search, and --path names them; leave one "
            "of these out"
        )
    else:
        found = named_paths(setting, parse_paths(path, wiring))
    return _paths_drawn(setting, found, top, threshold)


def sender_circuit(
    setting: Setting,
    *,
    receivers: str,
    senders: str | None = None,
    mediate: Mediate = "heads",
    top: Top = "all",
    threshold: float | None = None,
) -> CircuitGraph:
    """What each sender does by way of each receiver, see :mod:`.senders`.

    Args:
        setting: What is measured.
        receivers: Receivers, in the path language.
        senders: Senders, in the path language; None is all that run before a receiver.
        mediate: What stays as it is between them: ``heads``, or ``all``.
        top: How many edges to keep, by absolute score.
        threshold: Keep edges of at least this absolute score.

    Returns:
        Edges of ``kind`` ``path``. ``graph["senders"]`` has ``sender``, ``score`` and ``interval``
        of each sender by way of all heads and MLPs among the receivers at once, strongest first,
        where these are several.

    Raises:
        OptionError: a sender or receiver does not exist, or no sender runs before a receiver.
    """
    wiring = setting.model.wiring
    targets = parse_receivers(receivers, wiring)
    if senders is None:
        reached = {edge.source for edge in wiring.edges if edge[1:] in set(targets)}
        names = [source for source in wiring.sources if source in reached]
    else:
        names = parse_components(senders, wiring)
    found = measure_senders(setting, names, targets, mediate=mediate)
    labels = [_label(edge) for edge in found.edges]
    kept = strongest(stronger(found.effects).tolist(), labels, top, threshold)
    circuit = empty_circuit(setting.model, {n for row in kept for n in found.edges[row][:2]})
    rows = kept_rows(setting, found.effects, kept)
    findings = {labels[n]: effect_text(row) for n, row in zip(kept[:SHOWN], rows, strict=False)}
    for number, row in zip(kept, rows, strict=True):
        source, target, port = found.edges[number]
        circuit.add_effect(source, target, row.pop("score"), port=port, kind="path", **row)
    if found.together:
        inner = {edge.source for edge in found.edges if edge.target != "logits"}
        ranked = strongest(stronger(found.together).tolist(), found.senders, "all", None)
        order = [number for number in ranked if found.senders[number] in inner]
        joint = [
            {"sender": found.senders[number], **row}
            for number, row in zip(order, kept_rows(setting, found.together, order), strict=True)
        ]
        circuit.graph["senders"] = joint
        findings[f"{joint[0]['sender']}, all receivers together"] = effect_text(joint[0])
    circuit.graph |= {
        "score": SENDER_SCORE.replace("no head", "no head" if mediate == "heads" else "nothing"),
        "method": f"{found.method}, {' and '.join(setting.modes)}",
        "ablation": setting.ablation,
        "findings": findings,
    }
    return circuit


def hypothesis_circuit(
    setting: Setting,
    hypotheses: Sequence[Hypothesis],
    *,
    top: Top = "all",
    threshold: float | None = None,
) -> CircuitGraph:
    """How much of the effect hypotheses explain, and the circuit of their paths.

    ``graph["hypotheses"]`` has the results, see
    :func:`circuitlab_path_patching.paths.hypotheses.write_hypotheses`; the rest is that of
    :func:`path_circuit` for the hypotheses' paths, each patched alone.

    Raises:
        OptionError: a path does not end at ``logits``.
        ResourceError: a hypothesis is too large.
    """
    results = check_hypotheses(setting, hypotheses)
    paths = list(dict.fromkeys(path for each in hypotheses for path in each.paths))
    warnings = []
    if len(paths) > LIMIT:
        warnings.append(f"{len(paths):,} paths are too many to patch each alone: none is drawn")
        paths = []
    found = named_paths(setting, paths)
    circuit = _paths_drawn(setting, found, top, threshold)
    circuit.graph["findings"] = {}
    circuit.graph.setdefault("warnings", []).extend(warnings)
    write_hypotheses(circuit, results)
    return circuit


def _label(edge: Edge) -> str:
    return f"{edge.source}>{edge.target}{':' + edge.port if edge.port else ''}"


def _paths_drawn(
    setting: Setting, found: PathEffects, top: Top, threshold: float | None
) -> CircuitGraph:
    names = [str(path) for path in found.paths]
    scores = stronger(found.effects).tolist()
    kept = strongest(scores, names, top, threshold)
    listed = [
        {"path": names[number], **row}
        for number, row in zip(kept, kept_rows(setting, found.effects, kept), strict=True)
    ]
    through: dict[Edge, list[dict[str, Any]]] = {}
    for number, row in zip(kept, listed, strict=True):
        for edge in _edges(found.paths[number]):
            through.setdefault(edge, []).append(row)
    circuit = empty_circuit(setting.model, {name for edge in through for name in edge[:2]})
    for (source, target, port), rows in through.items():
        data = {**rows[0], "paths": [row["path"] for row in rows[:NAMED]]}
        del data["path"]
        circuit.add_effect(source, target, data.pop("score"), port=port, **data)
    warnings = list(found.warnings)
    if scores and not any(scores):
        warnings.append("every score is zero: nothing distinguishes one path from another")
    circuit.graph |= {
        "score": PATH_SCORE,
        "method": f"{found.method}, {' and '.join(setting.modes)}",
        "ablation": setting.ablation,
        "paths": listed,
        "findings": {row["path"]: effect_text(row) for row in listed[:SHOWN]},
        "warnings": warnings,
    }
    return circuit


def _edges(path: Path) -> list[Edge]:
    return [
        Edge(source, target, port)
        for (source, _), (target, ports) in pairwise(path.nodes)
        for port in ports or ("",)
    ]
