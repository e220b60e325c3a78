"""Drawing: the feature circuit as components and effects, and its panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import Curve, Curves, Point, Scatter
from circuitlab_feature_interactions.edges import edges_holding, mass_curve

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, Dictionary, Panel, Site, TracedModel
    from circuitlab_feature_interactions.edges import EdgeTable
    from circuitlab_feature_interactions.gathering import Activity

#: Tokens named for each latent, and points of a curve.
TOKENS, CURVE_POINTS = 5, 60
#: Share of the mass whose edges are counted.
HELD = 0.9


def latent_name(site: Site, latent: int, n: int) -> str:
    """``mlp_out.0.f17``; the number after the last latent is ``mlp_out.0.error``."""
    return f"{site}.error" if latent == n else f"{site}.f{latent}"


@dataclass(frozen=True)
class Nodes:
    """Adds latents of dictionaries to a circuit, with what is known of them.

    Attributes:
        circuit: Where they go.
        model: Any traced model.
        dictionaries: By site.
        activity: By site.
        unembedding: ``[d_model, vocab]``, norm folded in.
    """

    circuit: CircuitGraph
    model: TracedModel
    dictionaries: Mapping[Site, Dictionary]
    activity: Mapping[Site, Activity]
    unembedding: Tensor

    def add(self, site: Site, latent: int) -> str:
        """Add a latent, or the error, unless it is there, and return its name."""
        dictionary = self.dictionaries[site]
        name = latent_name(site, latent, dictionary.n)
        if name in self.circuit:
            return name
        error = latent == dictionary.n
        data: dict[str, Any] = {"site": str(site)}
        data |= {} if error else self._facts(site, latent)
        kind, layer = "error" if error else "feature", site.layer or 0
        return self.circuit.add_component(name, kind=kind, layer=layer, **data)

    def _facts(self, site: Site, latent: int) -> dict[str, Any]:
        activity = self.activity[site]
        facts: dict[str, Any] = {"index": latent}
        tokens = activity.top_tokens(latent, TOKENS)
        texts = self.model.token_texts([token for token, _ in tokens])
        facts |= {
            "density": float(activity.stats.densities[latent]),
            "mean_activation": activity.mean(latent),
            "max_activation": float(activity.largest[latent]),
            "top_tokens": [[t, v] for t, (_, v) in zip(texts, tokens, strict=True)],
            "role": " ".join(text.strip() or text for text in texts[:3]),
        }
        direction = self.dictionaries[site].W_d[latent].detach()
        if len(direction) == len(self.unembedding):
            logits = direction.to(self.unembedding.dtype) @ self.unembedding
            best = logits.topk(min(TOKENS, len(logits))).indices.tolist()
            facts["logit_lens"] = [
                [text, float(logits[token])]
                for text, token in zip(self.model.token_texts(best), best, strict=True)
            ]
        return facts


def edge_data(edges: EdgeTable, row: int, route: str) -> dict[str, Any]:
    """The statistics of an edge as plain JSON, without its score; what is not known is left out.

    Those of :class:`EdgeTable`, in its units. ``through_attention`` is all that is computed but for
    what comes through no attention, all heads together; that is ``through_mlp`` across a block, and
    ``direct``, from decoder row to encoder along the stream, between transcoders.
    """
    data: dict[str, Any] = {
        "route": route,
        "n": int(edges.n[row]),
        "mean_absolute": float(edges.mean_absolute[row]),
        "sign_consistency": float(edges.sign_consistency[row]),
    }
    if bool(edges.linearity[row].isfinite()):
        data["linearity"] = float(edges.linearity[row])
    if route in ("block", "transcoder"):
        data["offset"] = float(edges.offset[row])
    if bool(edges.local[row].isfinite()):
        data["direct" if route == "transcoder" else "through_mlp"] = float(edges.local[row])
        data["through_attention"] = float(edges.mean[row] - edges.local[row])
    return data


def panels(tables: Mapping[str, EdgeTable], circuit: CircuitGraph) -> list[Panel]:
    """Sorted sizes and mass of all edges, and the linearity of those in the circuit."""
    masses = {name: table.mass for name, table in tables.items() if bool(table.mass.any())}
    found: list[Panel] = []
    if masses:
        ranks = _ranks(max(map(len, masses.values())))
        found += [
            Curves(
                title="Sizes of edges, strongest first",
                caption="Steeper: fewer latents do the work. Sizes beyond rounding only.",
                x=ranks,
                x_label="rank of the edge",
                y_label="mean |attribution|, share of the target's mean",
                curves=[
                    Curve(name=name, mean=_at(_falling(table.mean_absolute), ranks, None))
                    for name, table in tables.items()
                    if name in masses
                ],
                log_x=True,
                log_y=True,
            ),
            Curves(
                title="Mass held by the strongest edges",
                caption="Σ |attribution| over all tokens, edges of the most mass first.",
                x=ranks,
                x_label="edges",
                y_label="share of the mass",
                curves=[
                    Curve(name=name, mean=_at(mass_curve(mass), ranks, 1.0), note=_holding(mass))
                    for name, mass in masses.items()
                ],
                log_x=True,
            ),
        ]
    points = [
        Point(name=f"{source} → {target}", x=abs(data["score"]), y=data["linearity"])
        for source, target, data in circuit.edges(data=True)
        if "linearity" in data
    ]
    if points:
        scatter = Scatter(
            title="Is an edge a line?",
            caption="1: the contribution is a linear function of the source's activation.",
            x_label="|score|",
            y_label="R² of the line",
            points=points,
        )
        found.append(scatter)
    return found


@dataclass(frozen=True)
class Compared:
    """One set of dictionaries among several.

    Attributes:
        name: Of its folder.
        r2: Centred R², mean over sites.
        l0: Active latents per token, mean over sites.
        edges: Edges that hold :data:`HELD` of the mass, per target latent that is ever active.
    """

    name: str
    r2: float
    l0: float
    edges: float


def comparison(sets: Sequence[Compared]) -> Panel:
    """Reconstruction against interactions; up and left is better."""
    return Scatter(
        title="Fewer edges, as good a reconstruction?",
        caption="Up and left is better; compare only what has the same L0.",
        x_label=f"edges that hold {HELD:.0%} of the mass, per target latent",
        y_label="centred R², mean over sites",
        points=[Point(name=f"{one.name}, L0 {one.l0:.3g}", x=one.edges, y=one.r2) for one in sets],
    )


def edges_per_target(tables: Sequence[EdgeTable]) -> float:
    """Edges that hold :data:`HELD` of the mass, over the number of targets that have any."""
    held = sum(edges_holding(table.mass, HELD) for table in tables)
    return held / max(1, sum(len(set(table.target.tolist())) for table in tables))


def _holding(mass: Tensor) -> str:
    return f"{HELD:.0%} in {edges_holding(mass, HELD)} of {len(mass)}"


def _falling(sizes: Tensor) -> Tensor:
    """Sizes from the largest, those above rounding."""
    falling = sizes.sort(descending=True).values
    return falling[falling > 1e-12 * falling[0]]


def _ranks(n: int) -> list[float]:
    """Ranks from 1 to n, at most :data:`CURVE_POINTS`, evenly on a logarithmic axis."""
    even = torch.logspace(0, torch.tensor(float(n)).log10().item(), CURVE_POINTS)
    return [float(rank) for rank in sorted({1, n, *map(int, even.round().clamp(1, n).tolist())})]


def _at(values: Tensor, ranks: Sequence[float], beyond: float | None) -> list[float | None]:
    """The values at these ranks, and ``beyond`` after the last one."""
    kept = values.tolist()
    return [kept[int(rank) - 1] if rank <= len(kept) else beyond for rank in ranks]
