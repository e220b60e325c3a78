"""Attribution-graph JSON of Neuronpedia and circuit-tracer, both ways.

``{"metadata": {"slug", "scan", "prompt_tokens", "prompt"}, "qParams", "nodes": [{"node_id",
"feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}], "links": [{"source", "target",
"weight"}]}`` (Ameisen et al. 2025, transformer-circuits.pub; Neuronpedia's ``graph-schema.json``).

A link is all ports of one pair of components, its weight the sum of their scores, with our sign.
What the format has no place for stands under a key ``circuitlab`` of the document, its nodes and
its links, which other readers pass over; so our own files come back complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from circuitlab.errors import GraphError
from circuitlab.formats.foreign import check_schema, to_circuit
from circuitlab.graph import EDGE_SCORE, SCHEMA, CircuitGraph
from circuitlab.labels import escape_xml, excerpt, visible
from circuitlab.tasks import slug

#: What our kinds of components are called there, and theirs here.
_TYPES = {
    "input": "embedding",
    "token": "embedding",
    "logits": "logit",
    "logit": "logit",
    "error": "mlp reconstruction error",
    "feature": "cross layer transcoder",
}
_KINDS = {
    "cross layer transcoder": "feature",
    "lorsa": "feature",
    "mlp reconstruction error": "error",
    "lorsa error": "error",
    "embedding": "token",
    "logit": "logit",
    "bias": "bias",
    "unknown": "unknown",
}
_FILLER = "…"
_PLAIN_ID = re.compile(r"[A-Za-z0-9_.:\[\]@+-]+")
#: Fields of a node that become something else here.
_OWN_FIELDS = frozenset({"node_id", "id", "layer", "ctx_idx", "kind", "position", "circuitlab"})


def neuronpedia_document(circuit: CircuitGraph) -> dict[str, Any]:
    """The circuit as an attribution graph.

    Text goes into web pages there, so labels are escaped as HTML; ``(p=`` begins a probability
    there and stands in the labels of logits alone.

    Raises:
        GraphError: the circuit is malformed.
    """
    circuit.validate()
    circuit.to_document()
    tokens = _prompt_tokens(circuit)
    ids = _ids(circuit)
    influence = _influence(circuit)
    graph = circuit.graph
    n_layers = max((data["layer"] for _, data in circuit.nodes(data=True)), default=0)
    nodes = []
    for name, data in circuit.nodes(data=True):
        place = _place(data, len(tokens))
        nodes.append({
            "node_id": ids[name],
            "feature": _feature(data),
            "layer": _layer(data, n_layers),
            "ctx_idx": place,
            "feature_type": str(data.get("feature_type") or _TYPES.get(data["kind"], "unknown")),
            "jsNodeId": f"{ids[name]}-0",
            "clerp": _label(name, data),
            "influence": influence.get(name),
            "circuitlab": {"name": name, "data": dict(data)},
        })  # fmt: skip
    links: dict[tuple[str, str], dict[str, Any]] = {}
    for source, target, port, data in circuit.edges(keys=True, data=True):
        ends = {"source": ids[source], "target": ids[target]}
        link = links.setdefault((source, target), {**ends, "weight": 0.0, "circuitlab": {}})
        link["weight"] += float(data["score"])
        link["circuitlab"][port] = dict(data)
    return {
        "metadata": {
            "slug": slug(f"{graph.get('model', 'model')}-{graph.get('task', 'task')}"),
            "scan": visible(str(graph.get("model", "unknown"))),
            "prompt_tokens": [visible(token) for token in tokens],
            "prompt": visible(_prompt(circuit, tokens)),
            "info": {
                "description": visible(f"score: {graph.get('score', EDGE_SCORE)}"),
                "generator": {"name": "CircuitLab"},
            },
        },
        "qParams": {
            "pinnedIds": [], "supernodes": _supernodes(circuit, ids), "linkType": "both",
        },
        "nodes": nodes,
        "links": list(links.values()),
        "circuitlab": {"schema": SCHEMA, "graph": dict(graph)},
    }  # fmt: skip


def parse_neuronpedia(document: object) -> CircuitGraph:
    """The circuit in an attribution graph, ours or another program's.

    Another program's feature is a component ``node_id`` at the token position ``ctx_idx``; its
    other fields stay with it, ``clerp`` as ``role``.

    Raises:
        GraphError: not such a document, a node or link is malformed, or an id stands for two nodes.
    """
    if not isinstance(document, Mapping):
        raise GraphError("not an attribution graph: no object")
    metadata, nodes, links = (document.get(key) for key in ("metadata", "nodes", "links"))
    if (
        not isinstance(metadata, Mapping)
        or not isinstance(nodes, list)
        or not isinstance(links, list)
    ):
        raise GraphError("not an attribution graph: it needs metadata, nodes and links")
    own = document.get("circuitlab")
    if own is not None:
        return _parse_own(own, nodes, links)
    tokens = metadata.get("prompt_tokens")
    texts = tokens if isinstance(tokens, list) else []
    params = document.get("qParams")
    params = params if isinstance(params, Mapping) else {}
    groups = dict(_groups(params.get("supernodes")))
    graph = {
        "model": str(metadata.get("scan", "unknown")),
        "prompt": str(metadata.get("prompt", "")),
        "prompt_tokens": [str(text) for text in texts],
        "metadata": dict(metadata),
        "qParams": dict(params),
    }
    if "qk_only_nodes" in document:
        graph["qk_only_nodes"] = document["qk_only_nodes"]
    found = [_node(node, texts, groups) for node in nodes]
    return to_circuit(graph, found, [_link(link) for link in links])


def _parse_own(own: object, nodes: list[Any], links: list[Any]) -> CircuitGraph:
    """The circuit in a file that we wrote."""
    try:
        if not isinstance(own, Mapping):
            raise TypeError
        check_schema(own.get("schema"))
        names = {node["node_id"]: node["circuitlab"]["name"] for node in nodes}
        found = [(names[node["node_id"]], node["circuitlab"]["data"]) for node in nodes]
        edges = [
            (names[link["source"]], names[link["target"]], {**data, "port": port})
            for link in links
            for port, data in link["circuitlab"].items()
        ]
        return to_circuit(own["graph"], found, edges, ours=True)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GraphError(f"a node or link of CircuitLab's is malformed ({error!r:.80})") from error


def _node(
    node: object, tokens: list[Any], groups: Mapping[str, str]
) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(node, Mapping) or not isinstance(node.get("node_id"), str):
        raise GraphError(f"node {node!r:.80} has no node_id that is text")
    name, place, layer = node["node_id"], node.get("ctx_idx"), node.get("layer")
    if isinstance(place, bool) or not isinstance(place, int):
        raise GraphError(f"node {name!r} has ctx_idx {place!r:.40}; it needs a whole number")
    kind = _KINDS.get(str(node.get("feature_type")), "feature")
    data = {key: value for key, value in node.items() if key not in _OWN_FIELDS}
    data |= {"kind": kind, "position": place, "role": str(data.pop("clerp", ""))}
    if kind == "token" and 0 <= place < len(tokens):
        data["token"] = str(tokens[place])
    if name in groups:
        data["supernode"] = groups[name]
    try:
        data["layer"] = 0 if layer == "E" else int(str(layer))
    except ValueError as error:
        raise GraphError(
            f"node {name!r} has layer {excerpt(str(layer), 40)!r}; it needs a whole number or 'E'"
        ) from error
    return name, data


def _link(link: object) -> tuple[str, str, Mapping[str, Any]]:
    if not isinstance(link, Mapping):
        raise GraphError(f"link {link!r:.80} is no object")
    ends = link.get("source"), link.get("target")
    if not isinstance(ends[0], str) or not isinstance(ends[1], str):
        raise GraphError(f"link {link!r:.80} has no source and target that are text")
    data = {key: value for key, value in link.items() if key not in ("source", "target", "key")}
    return ends[0], ends[1], {**data, "port": ""}


def _groups(supernodes: object) -> Iterator[tuple[str, str]]:
    """Node and label of each member of a supernode."""
    for group in supernodes if isinstance(supernodes, list) else []:
        if isinstance(group, list) and all(isinstance(part, str) for part in group) and group:
            yield from ((name, group[0]) for name in group[1:])


def _ids(names: Iterable[str]) -> dict[str, str]:
    """An id for each component; where its name is more than a plain word, a number."""
    names = list(names)
    taken = {name for name in names if _PLAIN_ID.fullmatch(name)}
    ids = {}
    for index, name in enumerate(names):
        ids[name] = name
        if name not in taken:
            ids[name] = next(
                n for n in (f"n{index}" + "_" * i for i in range(len(names) + 1)) if n not in taken
            )
            taken.add(ids[name])
    return ids


def _prompt_tokens(circuit: CircuitGraph) -> list[str]:
    """The prompt's tokens where the circuit knows them; else as many places as it speaks of."""
    known = circuit.graph.get("prompt_tokens")
    if isinstance(known, list) and known and all(isinstance(text, str) for text in known):
        return known
    places = {name: data["position"] for name, data in circuit.nodes(data=True) if _placed(data)}
    n = max((place + 1 if place >= 0 else -place for place in places.values()), default=1)
    tokens = [_FILLER] * n
    for name, place in places.items():
        text = circuit.nodes[name].get("token")
        if isinstance(text, str):
            tokens[place] = text
    return tokens


def _prompt(circuit: CircuitGraph, tokens: list[str]) -> str:
    prompt = circuit.graph.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if tokens == [_FILLER]:
        return f"all prompts of {circuit.graph.get('task', 'the task')}"
    return "".join(tokens)


def _placed(data: Mapping[str, Any]) -> bool:
    place = data.get("position")
    return isinstance(place, int) and not isinstance(place, bool) and abs(place) < 1 << 20


def _place(data: Mapping[str, Any], n: int) -> int:
    """A component's place in the prompt; what has none stands at the last token."""
    place = int(data["position"]) if _placed(data) else -1
    return min(max(place + n if place < 0 else place, 0), n - 1)


def _feature(data: Mapping[str, Any]) -> int | None:
    for key in ("feature", "index"):
        value = data.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _layer(data: Mapping[str, Any], n_layers: int) -> str:
    if data["kind"] in ("input", "token"):
        return "E"
    return str(n_layers + 1 if data["kind"] == "logits" else data["layer"])


def _label(name: str, data: Mapping[str, Any]) -> str:
    kind = data["kind"]
    if kind == "logits":
        # All tokens together; the page there reads a probability from every logit's label.
        return "Output: all logits (p=1.0)"
    role = data.get("role") or data.get("label") or ""
    if kind == "logit" and re.search(r"\(p=[\d.e-]+\)$", str(role)):
        text, _, chance = str(role).rpartition("(p=")
        return f"{_text(text)}(p={chance}"
    if kind == "token" and isinstance(data.get("token"), str):
        return _text(f'Emb: "{data["token"]}"')
    label = _text(f"{name} ({role})" if role else name)
    return f"{label} (p=1.0)" if kind == "logit" else label


def _text(text: str) -> str:
    return escape_xml(text).replace("(p=", "( p=")


def _influence(circuit: CircuitGraph) -> dict[str, float]:
    """Cumulative share of the absolute scores that leave the components, strongest first.

    The page there hides what lies above a threshold of it. What nothing leaves has none.
    """
    out = dict.fromkeys(circuit, 0.0)
    for source, _, data in circuit.edges(data=True):
        out[source] += abs(float(data["score"]))
    total, sum_so_far, found = sum(out.values()), 0.0, {}
    for name in sorted(out, key=lambda name: (-out[name], name)):
        if out[name] > 0:
            sum_so_far += out[name]
            found[name] = min(sum_so_far / total, 1.0)
    return found


def _supernodes(circuit: CircuitGraph, ids: Mapping[str, str]) -> list[list[str]]:
    """Label and ids of what belongs together: clusters, and supernodes of a file that was read."""
    groups: dict[str, list[str]] = {}
    for name, data in circuit.nodes(data=True):
        label = data.get("supernode")
        if data["kind"] == "cluster":
            label = data.get("role") or name
        if isinstance(label, str):
            groups.setdefault(label, []).append(ids[name])
    return [[_text(label), *members] for label, members in groups.items()]
