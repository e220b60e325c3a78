"""What is told of direction families: plain data, a finding, curves and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import Curve, Curves, TextTable, mean_intervals
from circuitlab_activation_plateaus.walks.medians import median_interval

if TYPE_CHECKING:
    from circuitlab import CircuitGraph
    from circuitlab_activation_plateaus.pushes.families import Pool
    from circuitlab_activation_plateaus.pushes.sensitivity import Sensitivity


def tell_sensitivities(
    circuit: CircuitGraph, found: Sequence[Sensitivity], pool: Pool, threshold: float, seed: int
) -> None:
    """Put results into a circuit: ``graph["directions"]``, findings and panels.

    Args:
        circuit: What is added to.
        found: All families of one kind of centre, then all of the next.
        pool: What was drawn from.
        threshold: KL in nats.
        seed: Of the intervals.
    """
    real = {each.family: each for each in found if each.centre == "real"}
    rows = [
        sensitivity_row(each, seed, None if each.centre == "real" else real.get(each.family))
        for each in found
    ]
    alphas = found[0].alphas.tolist()
    shared = {
        "site": str(pool.site),
        "unit": pool.unit,
        "n_activations": len(pool.activations),
        "threshold": threshold,
        "what": "KL(P at the centre || P) in nats by length, in units of the mean norm",
        "alphas": alphas,
        "families": rows,
    }
    circuit.graph["directions"] = shared
    findings = circuit.graph.setdefault("findings", {})
    for centre in dict.fromkeys(each.centre for each in found):
        chosen = [row for row in rows if row["centre"] == centre]
        findings[f"length to {threshold:g} nats from {centre}"] = _finding(chosen, alphas[-1])
        if "sooner" in chosen[0]:
            label = f"{centre} centres answer sooner than real ones"
            findings[label] = _sooner(chosen, alphas[-1])
        _curves(chosen, shared).add_to(circuit)
    _table(rows, shared).add_to(circuit)


def sensitivity_row(
    found: Sensitivity, seed: int, real: Sensitivity | None = None
) -> dict[str, Any]:
    """The result of one family and centre as plain JSON, without what lies beyond the reach.

    Args:
        found: Of one family and centre.
        seed: Of the intervals.
        real: The same family from real centres. ``sooner`` is then the share of rows whose crossing
            is shorter than from the real centre; equal ones, and those both beyond, count half.
    """
    bounds = mean_intervals(found.kl.T, seed)
    means = found.kl.mean(0).tolist()
    ends = [bound or (mean, mean) for bound, mean in zip(bounds, means, strict=True)]
    crossing = median_interval(found.crossing, seed)
    area = mean_intervals(found.area[None], seed)[0]
    row = {
        "family": found.family,
        "centre": found.centre,
        "n_rows": len(found.kl),
        "beyond": int(found.crossing.isinf().sum()),
        "median": found.median,
        "median_lo": None if crossing is None else crossing[0],
        "median_hi": None if crossing is None else crossing[1],
        "area": float(found.area.mean()),
        "area_lo": None if area is None else area[0],
        "area_hi": None if area is None else area[1],
        "cosine": float(found.cosine.mean()),
        "mean": means,
        "lo": [low for low, _ in ends],
        "hi": [high for _, high in ends],
    }
    if real is not None:
        shorter = torch.sign(real.crossing.nan_to_num() - found.crossing.nan_to_num())
        share = (1 + shorter) / 2
        bound = mean_intervals(share[None], seed)[0]
        row["sooner"] = float(share.mean())
        row["sooner_lo"], row["sooner_hi"] = (None, None) if bound is None else bound
    return {name: value for name, value in row.items() if value not in (None, torch.inf)}


def _interval(row: dict[str, Any], name: str, reach: float) -> str:
    """A value and its interval as text; what is not there lies beyond the reach."""

    def text(value: float | None) -> str:
        return f"> {reach:g}" if value is None else f"{value:.3g}"

    if row["n_rows"] < 2:
        return text(row.get(name))
    ends = (text(row.get(f"{name}_{end}")) for end in ("lo", "hi"))
    return f"{text(row.get(name))} [{', '.join(ends)}]"


def _finding(rows: Sequence[dict[str, Any]], reach: float) -> str:
    """Medians of one centre's families in one line, the most sensitive first."""
    ordered = sorted(rows, key=lambda row: row.get("median", torch.inf))
    return "; ".join(f"{row['family']} {_interval(row, 'median', reach)}" for row in ordered)


def _sooner(rows: Sequence[dict[str, Any]], reach: float) -> str:
    """How often one kind of centre answers sooner than the real ones, by family."""
    shares = (f"{row['family']} {_interval(row, 'sooner', reach)}" for row in rows)
    return f"share of rows: {'; '.join(shares)}"


def _curves(rows: Sequence[dict[str, Any]], shared: dict[str, Any]) -> Curves:
    """Mean responses of one centre's families.

    Args:
        rows: Of :func:`sensitivity_row`.
        shared: ``graph["directions"]``.
    """
    return Curves(
        title=f"Dose and response from {rows[0]['centre']} centres at {shared['site']}",
        x=shared["alphas"],
        x_label=f"length of the push, in mean norms ({shared['unit']:.3g})",
        y_label="KL from the centre's output, nats",
        curves=[
            Curve(name=row["family"], mean=row["mean"], lo=row["lo"], hi=row["hi"]) for row in rows
        ],
        caption=f"Mean over {rows[0]['n_rows']} rows with 95 % intervals",
    )


def _table(rows: Sequence[dict[str, Any]], shared: dict[str, Any]) -> TextTable:
    """All families and centres in one table; see :func:`_curves`."""
    reach = shared["alphas"][-1]
    compared = any("sooner" in row for row in rows)
    return TextTable(
        title=f"Sensitivity to directions at {shared['site']}",
        header=[
            "centre",
            "family",
            f"length to {shared['threshold']:g} nats",
            "beyond",
            "mean KL, nats",
            "cosine with centre",
            *(["sooner than from real"] if compared else []),
        ],
        rows=[
            [
                row["centre"],
                row["family"],
                _interval(row, "median", reach),
                f"{row['beyond']} of {row['n_rows']}",
                _interval(row, "area", reach),
                round(row["cosine"], 3) + 0.0,
                *([_interval(row, "sooner", reach) if "sooner" in row else ""] if compared else []),
            ]
            for row in rows
        ],
        caption=(
            "Length in mean norms of the activations, median over rows; mean KL up to a length of "
            f"{reach:g}, mean over rows{'; sooner: share of rows' if compared else ''}; 95 % "
            "intervals by bootstrap over rows"
        ),
    )
