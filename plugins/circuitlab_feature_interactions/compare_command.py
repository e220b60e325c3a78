"""The command ``dict compare``: settings at equal reconstruction, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab import (
    Bar,
    Bars,
    CircuitGraph,
    Curve,
    Curves,
    ModelError,
    OptionError,
    Panel,
    Point,
    Scatter,
    write_circuit,
)
from circuitlab_feature_interactions.comparing import (
    MEANS,
    Bench,
    By,
    Comparison,
    find_folders,
    numbers_of,
    tell,
)
from circuitlab_feature_interactions.controls import measure_baselines, measure_fresh
from circuitlab_feature_interactions.frontier import EDGES, Group, at_reconstruction
from circuitlab_feature_interactions.intervals import interval_of

if TYPE_CHECKING:
    import torch

    from circuitlab import TracedModel

_SUFFIXES = (".plot.svg", ".plot.png", ".plot.pdf", ".json")
_UNIT = "edges per token"
SHARE = f"{EDGES}_share"
#: Numbers that are shown; all are in the circuit.
_SHOWN = (
    "r2", "kl", "ce", "l0", EDGES, SHARE, "edges_90", "top_share", "gini", "error_share",
    "skip_share", "seeds", "on_frontier",
)  # fmt: skip


def compare_dictionaries(
    model: TracedModel,
    *,
    dictionaries: str,
    data: Path | None = None,
    n_tokens: int = 20_000,
    reconstruction: By = "r2",
    controls: bool = False,
    context_length: int | None = None,
    output: Path = Path("interactions.plot.svg"),
    seed: int = 0,
) -> dict[str, Any]:
    """Compare settings with and without a penalty at equal reconstruction.

    Sets of the same settings but another seed are one setting: its numbers are means over them.
    Each penalised setting is set beside the independent ones at its own reconstruction, see
    :mod:`circuitlab_feature_interactions.frontier`; intervals, 95 %, are over prompts and seeds,
    the same draws for all.

    Args:
        model: The model the sets are of.
        dictionaries: Folders with commas between them; a folder of sets stands for all in it.
        data: File of texts; None for the model's own corpus.
        n_tokens: At least so many tokens, as far as a file has them.
        reconstruction: What is to be equal, mean over sites: centred R², or what is recovered of
            the divergence or of the loss.
        controls: Also random directions, PCA and ICA at the first set's number of active latents,
            and its training on the model with new weights.
        context_length: Most tokens of a prompt; None: as many as the model reads.
        output: Picture to write, ``.plot.svg``, ``.plot.png``, ``.plot.pdf``, or ``.json``.
        seed: Of prompts and controls.

    Returns:
        Plain JSON: ``equal``, what equal means; ``settings``, by name their numbers;
        ``at_equal_reconstruction``, by name of each penalised setting its numbers less the
        independent ones', and of edges per token the share, or why there are none;
        ``at_same_settings``, likewise less those of the setting that differs in the penalty alone;
        ``controls``; ``findings``, a sentence each. A ``.json`` has more numbers, by site too, as
        ``graph["comparison"]``.

    Raises:
        OptionError: there are no such sets, both with and without a penalty; or the output has
            another suffix.
        ModelError: a set is damaged, or the model has no corpus.
        SiteError: the model has no such site.
        TaskError: the texts cannot be read.
        ResourceError: the picture cannot be written.
    """
    _check_output(output)
    bench = Bench.read(model, find_folders(dictionaries), data, n_tokens, context_length, seed)
    comparison = Comparison.of(bench.drawn(), reconstruction)
    found = {
        "prompts": bench.prompts,
        "tokens": bench.tokens,
        "equal": what_is_equal(comparison),
        "warnings": list(bench.warnings),
        "findings": {},
        **tell_comparison(comparison),
    }
    found["findings"] = tell_findings(comparison, found["at_equal_reconstruction"])
    beside: dict[str, dict[str, torch.Tensor]] = {}
    if controls:
        beside = _controls(bench, data, seed, found["warnings"])
        found["controls"] = {name: tell(numbers) for name, numbers in beside.items()}
    circuit = CircuitGraph(
        method=found["equal"], findings=found["findings"], warnings=found["warnings"]
    )
    circuit.graph["comparison"] = found
    for panel in panels(comparison, beside):
        panel.add_to(circuit)
    warnings = write_circuit(circuit, output)
    shown = {name: _shown(value) for name, value in found.items()}
    return shown | {"warnings": found["warnings"] + warnings, "picture": str(output)}


def _shown(value: Any) -> Any:
    """Numbers of settings without those that only files have."""
    if not isinstance(value, Mapping):
        return value
    return {
        setting: {k: v for k, v in told.items() if k.removesuffix("_interval") in _SHOWN}
        if isinstance(told, Mapping)
        else told
        for setting, told in value.items()
    }


def what_is_equal(comparison: Comparison) -> str:
    """A sentence on what is compared."""
    seeds = sorted({len(group.seeds) for group in comparison.groups})
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"the same {MEANS[comparison.by]}, mean over sites and over the {n} seeds of a "
        f"setting; between two settings of the independent frontier on a straight line, beyond its "
        f"ends nothing; intervals over prompts and seeds, paired, 95 %"
    )


def tell_comparison(comparison: Comparison) -> dict[str, Any]:
    """``settings``, ``at_equal_reconstruction``, ``at_same_settings``, as plain JSON."""
    equal: dict[str, Any] = {}
    same: dict[str, Any] = {}
    for group in comparison.groups:
        if not group.penalised:
            continue
        values = comparison.at_equal(group)
        told = tell(values)
        equal[group.setting] = told or _beyond(comparison, group)
        if (others := comparison.at_same_settings(group)) is not None:
            same[group.setting] = tell(others)
    settings = {
        group.setting: {
            "seeds": list(group.seeds),
            "on_frontier": group in (*comparison.independent, *comparison.penalised),
            **tell(group.numbers),
        }
        for group in comparison.groups
    }
    return {
        "settings": settings,
        "at_equal_reconstruction": equal,
        "at_same_settings": same,
    }


def tell_findings(comparison: Comparison, equal: Mapping[str, Any]) -> dict[str, str]:
    """One sentence on each penalised setting."""
    found = {}
    for setting, told in equal.items():
        if isinstance(told, str):
            found[setting] = told
            continue
        share, ends = told[SHARE], told.get(f"{SHARE}_interval")
        more = "more" if share > 0 else "fewer"
        text = f"{abs(share):.1%} {more} {_UNIT} than independent at equal {comparison.by}"
        if ends is not None:
            text += f" ({ends[0]:+.1%} to {ends[1]:+.1%})"
            text += "" if ends[0] > 0 or ends[1] < 0 else ", no difference shown"
        if "error_share" in told:
            text += f"; mass through errors {told['error_share']:+.1%}"
        found[setting] = text
    return found


# --- pictures -------------------------------------------------------------------------------------


def panels(
    comparison: Comparison, controls: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[Panel]:
    """Settings in the plane, both frontiers, the differences, and the controls."""
    by, what = comparison.by, f"{MEANS[comparison.by]}, mean over sites"
    # Colours follow the order of kinds here and of curves there.
    points = [
        Point(
            name=group.setting,
            x=float(group.numbers[EDGES][0]),
            y=float(group.numbers[by][0]),
            kind="penalised" if group.penalised else "independent",
        )
        for group in sorted(comparison.groups, key=lambda group: not group.penalised)
    ]
    found: list[Panel] = [
        Scatter(
            title="Reconstruction against interactions",
            caption="Up and left is better. Means over seeds.",
            x_label=_UNIT,
            y_label=what,
            points=points,
        ),
        _curves(comparison, what),
    ]
    for name, title, label in (
        (SHARE, "Edges per token at equal reconstruction", "penalised / independent - 1"),
        ("error_share", "Mass through errors at equal reconstruction", "penalised - independent"),
    ):
        if bars := _bars(comparison, name):
            caption = "Below 0: fewer with the penalty. 95 % over prompts and seeds."
            found.append(Bars(title=title, caption=caption, what=label, bars=bars))
    beside = [
        Point(name=name, x=float(n[EDGES][0]), y=float(n[by][0]), kind="control")
        for name, n in controls.items()
        if EDGES in n and by in n
    ]
    if beside:
        found.append(
            Scatter(
                title="Beside controls",
                caption="Generic directions; and the model with new weights, on its own values.",
                x_label=_UNIT,
                y_label=what,
                points=[*points, *beside],
            )
        )
    return found


def _curves(comparison: Comparison, what: str) -> Panel:
    """Edges per token over reconstruction, along both frontiers."""
    by = comparison.by
    kept = [*comparison.independent, *comparison.penalised]
    x = sorted({float(group.numbers[by][0]) for group in kept})
    curves = []
    for name, groups in (
        ("penalised", comparison.penalised),
        ("independent", comparison.independent),
    ):
        means: list[float | None] = []
        ends: list[tuple[float | None, float | None]] = []
        for place in x:
            wanted = groups[0].numbers[by].new_full(groups[0].numbers[by].shape, place)
            values = at_reconstruction(wanted, groups, by, [EDGES])[EDGES]
            known = bool(values[0].isfinite())
            means.append(float(values[0]) if known else None)
            ends.append((interval_of(values) if known else None) or (None, None))
        low, high = ([pair[i] for pair in ends] for i in (0, 1))
        curves.append(Curve(name=name, mean=means, lo=low, hi=high))
    return Curves(
        title="The frontiers",
        caption="At one place on the x axis both reconstruct alike. Bands: 95 %.",
        x=x,
        x_label=what,
        y_label=_UNIT,
        curves=curves,
    )


def _bars(comparison: Comparison, name: str) -> list[Bar]:
    found = []
    for group in comparison.groups:
        values = comparison.at_equal(group).get(name) if group.penalised else None
        if values is None or not bool(values[0].isfinite()):
            continue
        low, high = interval_of(values) or (None, None)
        found.append(Bar(name=group.setting, value=float(values[0]), lo=low, hi=high))
    return found


# --- controls -------------------------------------------------------------------------------------


def _controls(
    bench: Bench, data: Path | None, seed: int, warnings: list[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Numbers of the controls of the first set in each draw; what cannot be had is warned of."""
    own = next(iter(bench.sets.values()))
    found = {
        name: numbers_of(measured, bench.prompts)
        for name, measured in measure_baselines(
            bench.model, own, bench.batches, bench.fitting, seed=seed
        ).items()
    }
    try:
        fresh = measure_fresh(bench.model, own, data, bench.batches)
    except (ModelError, OptionError) as error:
        warnings.append(f"no control with new weights: {error}")
        return found
    return found | {"new-weights": numbers_of(fresh, bench.prompts)}


def _beyond(comparison: Comparison, group: Group) -> str:
    own = float(group.numbers[comparison.by][0])
    ends: Sequence[float] = [float(one.numbers[comparison.by][0]) for one in comparison.independent]
    side, remedy = ("less", "smaller") if own < ends[0] else ("more", "larger")
    return (
        f"reconstructs {side} ({comparison.by} {own:.4g}) than every independent setting of the "
        f"frontier ({ends[0]:.4g} to {ends[-1]:.4g}); train one with a {remedy} k"
    )


def _check_output(output: Path) -> None:
    if not output.name.lower().endswith(_SUFFIXES):
        raise OptionError(
            f"output '{output}' has no suffix of a comparison; give {', '.join(_SUFFIXES)}"
        )
    from circuitlab_feature_interactions.states import make_folder

    make_folder(output.resolve().parent)
