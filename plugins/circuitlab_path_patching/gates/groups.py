"""Groups: which nodes, edges and inputs are looked at together, as named or as found."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from circuitlab import CircuitGraph, Edge, GraphError, OptionError, Wiring
from circuitlab_path_patching.gates.types import MAX_MEMBERS
from circuitlab_path_patching.paths.language import (
    PORTS,
    Path,
    parse_components,
    parse_paths,
    parse_receivers,
)

#: Members of a group that is found: all mixtures of more cost too much to try on suspicion.
FOUND_MEMBERS = 4
#: Groups that are found, before their joint effect is known.
MAX_CANDIDATES = 64

Receiver = tuple[str, str]
_M = TypeVar("_M", Edge, str, Receiver)


@dataclass(frozen=True)
class Member:
    """A node, an edge or an input, and the edges that carry its value.

    Attributes:
        name: As ``--groups`` takes it: ``a0.h0``, ``a0.h0>m0``, ``a0.h0>a1.h0:k``, ``>a1.h0:k``.
        source: Component that writes; ``""`` for an input.
        target: Component that reads; ``""`` for a node.
        port: The one it reads through; ``""`` where it has no ports or reads through several.
        edges: All edges out of a node, or into an input; for an edge itself, or that through each
            port of a head.
    """

    name: str
    source: str
    target: str
    port: str
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Group:
    """Members that are patched in all mixtures."""

    members: tuple[Member, ...]

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def names(self) -> list[str]:
        """Names of the members."""
        return [member.name for member in self.members]

    @property
    def of_nodes(self) -> bool:
        """Whether all members are nodes."""
        return not any(member.target for member in self.members)

    @property
    def receiver(self) -> Receiver | None:
        """The component and port that all members lead into; None where there is no such one."""
        found = {(member.target, member.port) for member in self.members}
        return found.pop() if len(found) == 1 and not self.of_nodes else None

    @property
    def at_targets(self) -> bool:
        """Whether members are known by what reads them: edges out of one source, or inputs."""
        return not self.receiver and len({member.source for member in self.members}) == 1

    def ends(self) -> list[str] | None:
        """A component for each member to draw it by; None where two would be the same."""
        ends = [m.target if self.at_targets else m.source for m in self.members]
        return ends if len(set(ends)) == len(ends) and "" not in ends else None

    def internal(self) -> list[Edge]:
        """Edges of a group of nodes from one of them to another."""
        inside = {member.source for member in self.members}
        return [edge for m in self.members for edge in m.edges if edge.target in inside]

    def subset(self, places: Sequence[int]) -> Group:
        """The group of some of its members."""
        return Group(tuple(self.members[place] for place in places))

    def __str__(self) -> str:
        """For people: ``a0.h0 + a0.h1 → m0``, ``a0.h1 → k of a1.h0, a1.h2``."""
        ports = {member.port for member in self.members}
        if self.receiver:
            target, port = self.receiver
            joined = " + ".join(member.source for member in self.members)
            return f"{joined} → {target}{':' + port if port else ''}"
        if self.at_targets and len(ports) == 1 and ports != {""}:
            targets = ", ".join(member.target for member in self.members)
            source = self.members[0].source
            return f"{source}{' → ' * bool(source)}{ports.pop()} of {targets}"
        return " + ".join(name.replace(">", " → ").lstrip() for name in self.names)


def group_of(members: Sequence[Edge | str], wiring: Wiring) -> Group:
    """The group of these edges and nodes.

    Raises:
        OptionError: there are none, more than 8, or two that share an edge.
        GraphError: the model has no such member.
    """
    return _checked([_member(member, wiring) for member in members], "group")


def parse_groups(text: str, wiring: Wiring) -> list[Group]:
    """The groups that a text names.

    Semicolons or line ends stand between groups, blanks or commas between members. A member is a
    node, ``a0.h0``, an edge, ``a0.h0>a1.h0:k``, or all that something reads, ``>a1.h0:k``; without
    a port what a head reads is that through all three together. A wildcard, as in ``a0.h1>a1.*:k``,
    is one member for each component or port that it stands for.

    Raises:
        OptionError: a member cannot be read or is not in the model, or a group has fewer than two
            members, more than eight, or two that share an edge; or there is no group.
    """
    groups = []
    # A blank before '>' alone begins the next member, which is an input.
    joined = re.sub(r"[ \t]+>[ \t]+|>[ \t]+", ">", text)
    for piece in re.split(r"[;\r\n]", joined):
        words = re.split(r"[\s,]+", piece.strip(" \t,"))
        if not any(words):
            continue
        members: dict[Member, None] = {}
        for word in words:
            members.update(dict.fromkeys(_parse_member(word, wiring)))
        if len(members) < 2:
            raise OptionError(
                f"group {piece.strip()!r} has one member; a gate joins two or more, as in "
                f"'a0.0>m0 a0.1>m0'"
            )
        groups.append(_checked(list(members), f"group {piece.strip()!r}"))
    if not groups:
        raise OptionError("groups are empty; name members of one, as in 'a0.0>m0 a0.1>m0'")
    return groups


def _parse_member(word: str, wiring: Wiring) -> list[Member]:
    if ">" not in word:
        return [_member(name, wiring) for name in parse_components(word, wiring)]
    if word.startswith(">"):
        read: dict[str, list[str]] = {}
        for target, port in parse_receivers(word[1:], wiring):
            read.setdefault(target, []).append(port)
        if ":" in word:
            return [_input(t, port, wiring) for t, ports in read.items() for port in ports]
        return [_input(target, "", wiring) for target in read]
    return [_edge_member(path, word, wiring) for path in parse_paths(word, wiring)]


def _edge_member(path: Path, word: str, wiring: Wiring) -> Member:
    if len(path.nodes) != 2:
        raise OptionError(
            f"member {word!r} is a path of {len(path.nodes) - 1} edges; name nodes, as a0.0, or "
            f"single edges, as a0.0>m0"
        )
    (source, _), (target, ports) = path.nodes
    if len(ports) < 2:
        return _member(Edge(source, target, ports), wiring)
    edges = tuple(Edge(source, target, port) for port in ports)
    return Member(str(path), source, target, "", edges)


def _member(member: Edge | str, wiring: Wiring) -> Member:
    if isinstance(member, str):
        if wiring.component(member).kind == "logits":
            raise GraphError("component 'logits' writes nothing; it cannot be a member of a group")
        edges = tuple(edge for edge in wiring.edges if edge.source == member)
        return Member(member, member, "", "", edges)
    source, target, port = member
    wiring.by_block([Edge(source, target, port)])
    name = f"{source}>{target}{':' + port if port else ''}"
    return Member(name, source, target, port, (Edge(source, target, port),))


def _input(target: str, port: str, wiring: Wiring) -> Member:
    """What a component reads through a port, or through all that it has."""
    edges = tuple(e for e in wiring.edges if e.target == target and port in ("", e.port))
    return Member(f">{target}{':' + port if port else ''}", "", target, port, edges)


def _checked(members: Sequence[Member], where: str) -> Group:
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise OptionError(
            f"{where} has {len(members)} members; give 1 to {MAX_MEMBERS}, since all "
            f"2**members mixtures are run"
        )
    owner: dict[Edge, str] = {}
    for member in members:
        for edge in member.edges:
            if edge in owner:
                raise OptionError(
                    f"{where}: members {owner[edge]} and {member.name} share the edge "
                    f"{edge.source}>{edge.target}{':' + edge.port if edge.port else ''}; leave one "
                    f"of them out"
                )
            owner[edge] = member.name
    return Group(tuple(members))


def find_groups(
    circuit: CircuitGraph, wiring: Wiring, totals: dict[str, float], least: float
) -> list[Group]:
    """Groups worth trying among what a circuit has, the strongest members of each.

    In this order: the edges into one receiver; the edges out of one source into the same port of
    the heads of a layer; all that these heads read through it; the heads of a layer; the strongest
    nodes.

    Args:
        circuit: Its effects that are edges of the model are taken.
        wiring: The model's.
        totals: Effect of each node that is taken, in either mode the larger.
        least: Smallest |score| of a member.
    """
    scores = {
        Edge(source, target, port): score
        for source, target, port, score in circuit.effects()
        if circuit.edges[source, target, port].get("kind") != "total" and abs(score) >= least
    }
    layer_of = {name: wiring.component(name).layer for name in (*wiring.sources, "logits")}
    heads = {edge: score for edge, score in scores.items() if edge.port}
    inputs: dict[Receiver, float] = defaultdict(float)
    for edge, score in heads.items():
        inputs[edge.target, edge.port] += score
    nodes = {name: score for name, score in totals.items() if abs(score) >= least}
    of_heads = {name: score for name, score in nodes.items() if name.startswith("a")}
    # Input writes what all others read: to patch it is to change the prompt.
    parts = {name: score for name, score in nodes.items() if name != "input"}
    found: dict[Group, float] = {}

    def add(build: Callable[[_M], Member], chosen: list[tuple[list[_M], float]]) -> None:
        for keys, size in chosen:
            members = sorted(map(build, keys), key=lambda member: _when(member, wiring))
            found.setdefault(_checked(members, "group"), size)

    def member(edge_or_node: Edge | str) -> Member:
        return _member(edge_or_node, wiring)

    add(member, _strongest(scores, lambda edge: (edge.target, edge.port)))
    add(member, _strongest(heads, lambda e: (e.source, e.port, layer_of[e.target])))
    add(lambda key: _input(*key, wiring), _strongest(inputs, lambda k: (layer_of[k[0]], k[1])))
    add(member, _strongest(of_heads, lambda name: layer_of[name]))
    add(member, _strongest(parts, lambda name: ""))
    ranked = sorted(found, key=lambda group: -found[group])[:MAX_CANDIDATES]
    return [group for group in found if group in ranked]


def _strongest(
    scores: Mapping[_M, float], key: Callable[[_M], object]
) -> list[tuple[list[_M], float]]:
    """The strongest members of the same key, and their |scores| summed; keys as first met."""
    groups: dict[object, list[_M]] = defaultdict(list)
    for member in sorted(scores, key=lambda member: (-abs(scores[member]), member)):
        groups[key(member)].append(member)
    chosen = [members[:FOUND_MEMBERS] for members in groups.values() if len(members) > 1]
    return [(members, sum(abs(scores[m]) for m in members)) for members in chosen]


def _when(member: Member, wiring: Wiring) -> tuple[int, int, int]:
    """Place in the order in which members run."""
    place = {"": -1, "logits": len(wiring.sources), **wiring.source_rows}
    return place[member.source], place[member.target], ("", *PORTS).index(member.port)
