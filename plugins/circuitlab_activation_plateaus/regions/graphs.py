"""The region graph: regions of outputs, and the borders between them that walks cross."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import Bar, Bars, CircuitGraph, TextTable
from circuitlab_activation_plateaus.walks.medians import median_interval

if TYPE_CHECKING:
    from circuitlab import Interval
    from circuitlab_activation_plateaus.regions.finding import RegionFacts
    from circuitlab_activation_plateaus.regions.normals import Crossings, Directions, Facing

SCORE = "share of walks that cross the border of two regions, 0 to 1"
#: Rows of a table and bars of a panel, at most.
SHOWN = 15


@dataclass(frozen=True, eq=False)
class Border:
    """What was seen at the border of two regions.

    Attributes:
        source: One region.
        target: The other; further from the largest region, or as far and smaller.
        n_walks: Walks that cross it.
        forward: Crossings from source to target.
        backward: Crossings from target to source.
        location: Median place of each walk's first crossing, as a share of the path; counted from
            the path's other end where it goes from target to source.
        location_interval: 95 % over walks; None for a single one.
        slope: Median growth of the margin there, in nats over the whole path at that rate.
        slope_interval: 95 % over walks.
        n_normals: Crossings with a normal.
        agreement: Length of the mean of their unit normals: 1 for a plane, 0 where they cancel;
            None without any.
        normal: That mean as a unit vector towards the target, ``[d]``.
    """

    source: int
    target: int
    n_walks: int
    forward: int
    backward: int
    location: float
    location_interval: Interval | None
    slope: float
    slope_interval: Interval | None
    n_normals: int
    agreement: float | None
    normal: Tensor | None


def in_order(n: int, crossings: Crossings) -> list[int]:
    """All regions, the largest first, then by how many borders they are away from it.

    Regions are numbered by size. What no walk joins to the largest follows, by the same rule.
    """
    joined: dict[int, set[int]] = {region: set() for region in range(n)}
    for a, b in zip(crossings.before.tolist(), crossings.after.tolist(), strict=True):
        joined[a].add(b)
        joined[b].add(a)
    order: list[int] = []
    for start in range(n):
        ring = [] if start in order else [start]
        while ring:
            order += ring
            ring = sorted({b for a in ring for b in joined[a]} - set(order))
    return order


def find_borders(
    order: Sequence[int], crossings: Crossings, facing: Facing, seed: int = 0
) -> list[Border]:
    """The borders that were crossed, by the number of walks.

    Args:
        order: All regions; a border leads from the earlier to the later.
        crossings: Where walks cross.
        facing: How.
        seed: Of the intervals.
    """
    place = {region: number for number, region in enumerate(order)}
    at: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(crossings.before.tolist(), crossings.after.tolist(), strict=True)):
        source, target = sorted(pair, key=lambda region: place[region])
        at.setdefault((source, target), []).append(i)
    found = [_border(pair, crossings, facing, chosen, seed) for pair, chosen in at.items()]
    return sorted(found, key=lambda b: (-b.n_walks, place[b.source], place[b.target]))


@dataclass(frozen=True, eq=False)
class Names:
    """What regions are called.

    Attributes:
        tokens: Each region's most likely token as text, ``[k]``.
    """

    tokens: Sequence[str]

    def node(self, region: int) -> str:
        """Its name in the graph."""
        return f"r{region + 1}"

    def full(self, region: int) -> str:
        """Name and token."""
        return f"{self.node(region)} {self.tokens[region].strip() or repr(self.tokens[region])}"

    def border(self, border: Border) -> str:
        """Both regions."""
        return f"{self.full(border.source)} | {self.full(border.target)}"


@dataclass(frozen=True, eq=False)
class Matches:
    """What the normals of borders are like.

    Attributes:
        directions: Sets of directions.
        n: How many of each are named.
        readout: Each region's direction towards the logit of its token, ``[k, d]``; None where the
            site is no stream.
        chance: By the name of a set, the largest |cos| that 95 % of random directions stay below.
    """

    directions: Sequence[Directions]
    n: int
    readout: Tensor | None
    chance: dict[str, float]

    def of(self, border: Border) -> dict[str, Any]:
        """The best directions of each set, and the cosine with the readout's own normal."""
        normal = border.normal
        if normal is None:
            return {}
        found: dict[str, Any] = {
            "matches": {
                named.name: [
                    {"name": name, "cosine": cosine} for name, cosine in named.match(normal, self.n)
                ]
                for named in self.directions
            }
        }
        if self.readout is not None:
            direct = (self.readout[border.target] - self.readout[border.source]).to(normal)
            if direct.norm() > 0:  # two regions may have the same token
                found["readout"] = float(normal @ direct / direct.norm())
        return found


def region_circuit(
    facts: Sequence[RegionFacts],
    borders: Sequence[Border],
    names: Names,
    matches: Matches,
    *,
    layer: int,
    ends: Tensor,
    n_walks: int,
) -> CircuitGraph:
    """The graph: a component of kind ``region`` each, and an effect for each border.

    Args:
        facts: What each region holds.
        borders: Between them.
        names: Their names.
        matches: What normals are held against.
        layer: Of the site.
        ends: Regions of the walks' first and last states, ``[m]``.
        n_walks: How many walks there were.
    """
    circuit = CircuitGraph(score=SCORE, n_edges_total=len(borders))
    own = torch.bincount(ends, minlength=len(facts)).tolist()
    for region, fact in enumerate(facts):
        circuit.add_component(
            names.node(region),
            kind="region",
            layer=layer,
            token=names.tokens[region],
            token_id=fact.token,
            probability=fact.probability,
            role=f"{fact.mass:.0%}" if fact.mass >= 0.005 else "<1%",
            mass=fact.mass,
            n_states=fact.n_states,
            variance=fact.variance,
            ends=own[region],
        )
    for border in borders:
        circuit.add_effect(
            names.node(border.source),
            names.node(border.target),
            border.n_walks / n_walks,
            **_plain(border),
            **matches.of(border),
        )
    if matches.chance:
        circuit.graph["chance"] = matches.chance
    return circuit


def findings(
    facts: Sequence[RegionFacts],
    borders: Sequence[Border],
    names: Names,
    crossings: Crossings,
    facing: Facing,
    *,
    ends: Tensor,
    n_walks: int,
) -> dict[str, str]:
    """What the graph says, in a line each."""
    empty = len(facts) - len(set(ends.tolist()))
    largest = max(range(len(facts)), key=lambda region: facts[region].mass)
    said = f"{len(facts)}; the largest, {names.full(largest)}, has {facts[largest].mass:.0%}"
    if empty:
        said += f"; {empty} hold no end of a walk"
    crossed = len(set(crossings.rows.tolist()))
    possible = len(facts) * (len(facts) - 1) // 2
    found = {
        "regions": said,
        "crossings": f"{len(crossings) / n_walks:.2f} per walk; {n_walks - crossed} of {n_walks} "
        f"walks cross none; {len(borders)} of {possible} pairs of regions have a border",
    }
    if borders:
        most = borders[0]
        found["most crossed"] = f"{names.border(most)}, by {most.n_walks} of {n_walks} walks"
        n_known = int(facing.known.sum())
        line = f"{n_known} of {len(crossings)} crossings have one"
        several = [b.agreement for b in borders if b.agreement is not None and b.n_normals > 1]
        if n_known < len(crossings):
            line += ", at the others the gradient does not see the change"
        if several:
            line += f"; within a border they agree to {median(several):.2f}, median"
        found["normals"] = line
    return found


def matched(circuit: CircuitGraph) -> dict[str, str]:
    """How the normals' best matches compare with those of random directions."""
    found = {}
    edges = [data for _, _, data in circuit.edges(data=True)]
    for name, chance in circuit.graph.get("chance", {}).items():
        best = [abs(d["matches"][name][0]["cosine"]) for d in edges if "matches" in d]
        if best:
            above = sum(value > chance for value in best)
            found[f"nearest {name}"] = (
                f"|cos| {median(best):.2f}, median of {len(best)} borders; {above} of them above "
                f"{chance:.2f}, where 95 % of random directions stay below"
            )
    direct = [data["readout"] for data in edges if "readout" in data]
    if direct:
        found["readout"] = (
            f"cos {median(direct):+.2f}, median: of a normal with the difference of the two "
            f"tokens' unembeddings"
        )
    return found


def add_panels(
    circuit: CircuitGraph, facts: Sequence[RegionFacts], borders: Sequence[Border], names: Names
) -> None:
    """Bars of the regions, and a table of the borders."""
    shown = min(len(facts), SHOWN)
    Bars(
        title="Regions",
        what="share of the states",
        caption=f"The largest of {len(facts)}. p: mean probability of the token; variance: of "
        "log-probabilities within the region, nats².",
        bars=[
            Bar(
                name=names.full(region),
                value=facts[region].mass,
                note=f"p {facts[region].probability:.2f}, variance {facts[region].variance:.3g}",
                kind=_held(circuit, names.node(region)),
            )
            for region in range(shown)
        ],
    ).add_to(circuit)
    if not borders:
        return
    sets = list(circuit.graph.get("chance", {}))
    rows: list[list[str | float]] = []
    for border in borders[:SHOWN]:
        data = circuit.edges[names.node(border.source), names.node(border.target), ""]
        best = [data["matches"][name][0] if "matches" in data else None for name in sets]
        rows.append(
            [
                names.border(border),
                border.n_walks,
                f"{border.location:.2f}",
                f"{border.slope:.3g}",
                "" if border.agreement is None else f"{border.agreement:.2f}",
                *("" if b is None else f"{b['name']} {b['cosine']:+.2f}" for b in best),
            ]
        )
    held = [f"random below {circuit.graph['chance'][name]:.2f}" for name in sets]
    TextTable(
        title="Borders",
        header=["border", "walks", "location", "slope", "agreement", *sets],
        rows=rows,
        caption="Location: share of the path from the first region's side. Slope: nats of margin "
        "per path. Agreement: length of the mean unit normal. Nearest directions with cosine"
        + (f"; |cos| {', '.join(held)}." if held else "."),
    ).add_to(circuit)


def _held(circuit: CircuitGraph, name: str) -> str:
    return "holds ends of walks" if circuit.nodes[name]["ends"] else "in between"


def _border(
    pair: tuple[int, int], crossings: Crossings, facing: Facing, chosen: list[int], seed: int
) -> Border:
    """The border of two regions from its crossings, which are in order of walk and place."""
    at = torch.tensor(chosen, device=crossings.t.device)
    rows, onwards = crossings.rows[at], crossings.before[at] == pair[0]
    first = [i for i, row in enumerate(rows.tolist()) if row not in rows[:i].tolist()]
    places = torch.where(onwards, crossings.t[at], 1 - crossings.t[at])[first].cpu()
    slopes = facing.slope[at][first].cpu()
    known = facing.known[at]
    signs = torch.where(onwards, 1.0, -1.0).to(facing.normals)
    normals = (facing.normals[at] * signs[:, None])[known]
    mean = normals.mean(0) if len(normals) else None
    length = None if mean is None else float(mean.norm())
    return Border(
        *pair,
        n_walks=len(first),
        forward=int(onwards.sum()),
        backward=int((~onwards).sum()),
        location=median(places.tolist()),
        location_interval=median_interval(places, seed),
        slope=median(slopes.tolist()),
        slope_interval=median_interval(slopes, seed),
        n_normals=len(normals),
        agreement=length,
        normal=mean / length if mean is not None and length else None,
    )


def _plain(border: Border) -> dict[str, Any]:
    """What a file holds of a border; what was not measured is left out."""
    data: dict[str, Any] = {
        "n_walks": border.n_walks,
        "forward": border.forward,
        "backward": border.backward,
        "location": border.location,
        "slope": border.slope,
        "n_normals": border.n_normals,
    }
    for name in ("location_interval", "slope_interval"):
        if (interval := getattr(border, name)) is not None:
            data[name] = list(interval)
    if border.agreement is not None:
        data["agreement"] = border.agreement
    if border.normal is not None:
        data["normal"] = border.normal.tolist()
    return data
