"""Compare dictionaries with and without a penalty on interactions, at equal reconstruction.

Run by hand, in about a quarter of an hour on one thread; writes the tables of docs/interactions.md
(all below its line "## Tables") and the picture. An argument names a folder in which the trained
sets are kept, and gone on with.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from circuitlab_feature_interactions.compare_command import SHARE, panels
from circuitlab_feature_interactions.comparing import Bench, Comparison, numbers_of
from circuitlab_feature_interactions.controls import measure_baselines
from circuitlab_feature_interactions.data import generator_of
from circuitlab_feature_interactions.evaluating import measure
from circuitlab_feature_interactions.frontier import Drawn
from circuitlab_feature_interactions.intervals import interval_of
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.training import train
from torch import Tensor

import circuitlab

PAGE = Path(__file__).with_name("interactions.md")
PICTURE = Path(__file__).parent / "pictures" / "interactions.svg"
BELOW = "## Tables\n"
SEEDS = (0, 1, 2)
TOKENS = 4000


@dataclass(frozen=True)
class Experiment:
    """A model, a pair of sites, and the settings that are compared.

    Attributes:
        model: Bundled.
        sites: One pair.
        independent: The k of settings without a penalty.
        penalised: k and strength of those with one.
        common: What all settings share.
        fresh: The k and strength that are also trained on the model with new weights.
    """

    model: str
    sites: str
    independent: Sequence[int]
    penalised: Sequence[tuple[int, float]]
    common: Mapping[str, Any]
    fresh: tuple[int, float]

    def settings(self) -> Iterator[TrainSettings]:
        """All trainings."""
        kinds = [(k, "none", 0.0) for k in self.independent]
        kinds += [(k, "l1", strength) for k, strength in self.penalised]
        for k, interaction, strength in kinds:
            for seed in SEEDS:
                yield self.training(k, interaction, strength, seed)

    def training(self, k: int, interaction: Any, strength: float, seed: int) -> TrainSettings:
        """One training."""
        return TrainSettings(
            sites=self.sites,
            k=k,
            interaction=interaction,
            strength=strength,
            seed=seed,
            **self.common,
        )


EXPERIMENTS = (
    Experiment(
        "induction",
        "mlp.0",
        (4, 6, 8, 12),
        ((8, 0.008), (8, 0.024), (8, 0.08)),
        {"steps": 800, "batch_tokens": 128, "estimator": "tokens:32"},
        (8, 0.024),
    ),
    Experiment(
        "induction",
        "block.1",
        (4, 6, 8, 12),
        ((8, 0.008), (8, 0.024), (8, 0.08)),
        {"steps": 500, "batch_tokens": 128, "estimator": "rows:4,tokens:32"},
        (8, 0.024),
    ),
    Experiment(
        "and-superposition",
        "mlp.0",
        (3, 4, 6, 8),
        ((6, 0.006), (6, 0.018), (6, 0.06)),
        {"steps": 1000, "batch_tokens": 256, "expansion": 2.0, "estimator": "tokens:64"},
        (6, 0.018),
    ),
)


def main(arguments: Sequence[str]) -> None:
    """Train, measure, and write the tables and the picture."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as other:
        folder = Path(arguments[0] if arguments else other)
        parts, drawn = [], circuitlab.CircuitGraph(method="docs/compare_interactions.py")
        for experiment in EXPERIMENTS:
            part, found = compare(experiment, folder)
            parts.append(part)
            for panel in found:
                panel.add_to(drawn)
    circuitlab.write_circuit(drawn, PICTURE.with_suffix(".plot.svg"))
    PICTURE.with_suffix(".plot.svg").replace(PICTURE)
    head = PAGE.read_text(encoding="utf-8").partition(BELOW)[0]
    note = "\nWritten by `python docs/compare_interactions.py`.\n"
    PAGE.write_text(head + BELOW + note + "".join(parts), encoding="utf-8")


def compare(experiment: Experiment, folder: Path) -> tuple[str, list[circuitlab.Panel]]:
    """The tables of an experiment, and its panels."""
    model = circuitlab.load_model(experiment.model)
    own = folder / experiment.model / experiment.sites
    folders = [place_of(settings, own) for settings in experiment.settings()]
    for settings, place in zip(experiment.settings(), folders, strict=True):
        train(model, settings, place)
    bench = Bench.read(model, folders, None, TOKENS, None, 0)
    sets = bench.drawn()
    comparison = Comparison.of(sets, "r2")
    beside = controls(experiment, bench, model, own)
    title = f"`{experiment.model}`, `{experiment.sites}`"
    text = (
        f"\n### {title}\n\n"
        f"{bench.tokens:,} tokens of {bench.prompts:,} fresh prompts; {len(SEEDS)} seeds each.\n\n"
        + settings_table(comparison)
        + differences_table(comparison, Comparison.of(sets, "kl"), by_seed(sets))
        + controls_table(beside)
    )
    shown = panels(comparison, {})[:3]
    name = f"{experiment.model}, {experiment.sites}"
    return text, [replace(panel, title=f"{name}: {panel.title.lower()}") for panel in shown]


def place_of(settings: TrainSettings, folder: Path) -> Path:
    """Where a set is kept."""
    penalty = f"{settings.interaction}-{settings.strength:g}"
    return folder / f"{penalty}-k{settings.k}-seed{settings.seed}"


def controls(
    experiment: Experiment, bench: Bench, model: circuitlab.TracedModel, folder: Path
) -> dict[str, Mapping[str, Tensor]]:
    """Numbers of the controls, at the k that is trained on new weights too."""
    k, strength = experiment.fresh
    name = f"none-0-k{k}-seed{SEEDS[0]}"
    first = next(one for path, one in bench.sets.items() if path.name == name)
    found: dict[str, Mapping[str, Tensor]] = {
        name: numbers_of(measured, bench.prompts)
        for name, measured in measure_baselines(model, first, bench.batches, bench.fitting).items()
    }
    shuffled = measure(
        model, first.pairs, first.dictionaries, bench.batches, shuffled=generator_of(0, 2)
    )
    found[f"independent, k {k}, shuffled"] = numbers_of(shuffled, bench.prompts)
    for kind, weight in (("none", 0.0), ("l1", strength)):
        fresh = model.reinitialised(SEEDS[0])
        settings = experiment.training(k, kind, weight, SEEDS[0])
        own = train(fresh, settings, place_of(settings, folder / "new-weights"))
        measured = measure(fresh, own.pairs, own.dictionaries, bench.batches)
        label = "independent" if kind == "none" else f"{kind} {weight:g}"
        found[f"new weights, {label}, k {k}"] = numbers_of(measured, bench.prompts)
    return found


def by_seed(sets: Sequence[Drawn]) -> dict[str, list[float]]:
    """Of each penalised setting the share of edges more than independent, seed by seed."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        one = Comparison.of([own for own in sets if own.seed == seed], "r2")
        for group in one.groups:
            if group.penalised:
                found.setdefault(group.setting, []).append(float(one.at_equal(group)[SHARE][0]))
    return found


# --- tables ---------------------------------------------------------------------------------------

COLUMNS = {
    "edges per token": ("edges_per_token", "{:.1f}"),
    "edges of 90 %": ("edges_90", "{:.0f}"),
    "top 100 hold": ("top_share", "{:.1%}"),
    "Gini": ("gini", "{:.3f}"),
    "from errors": ("error_share", "{:.1%}"),
    "skip": ("skip_share", "{:.1%}"),
}


def settings_table(comparison: Comparison) -> str:
    """The numbers of every setting."""
    sites = [name for name in comparison.names if name.startswith("r2 ")]
    columns = {f"R² {name[3:]}": (name, "{:.3f}") for name in sites}
    columns |= {"KL recovered": ("kl", "{:.3f}"), **COLUMNS}
    columns = {title: how for title, how in columns.items() if how[0] in comparison.names}
    lines = [header(["setting", *columns])]
    for group in comparison.groups:
        cells = [cell(group.numbers[name], form) for name, form in columns.values()]
        lines.append(row([group.setting, *cells]))
    return "".join(lines)


def differences_table(
    comparison: Comparison, by_kl: Comparison, seeds: Mapping[str, Sequence[float]]
) -> str:
    """Penalised less independent at equal reconstruction."""
    columns = {
        "edges per token": (SHARE, "{:+.1%}"),
        "edges of 90 %": ("edges_90", "{:+.0f}"),
        "top 100 hold": ("top_share", "{:+.1%}"),
        "Gini": ("gini", "{:+.3f}"),
        "from errors": ("error_share", "{:+.1%}"),
        "skip": ("skip_share", "{:+.1%}"),
    }
    columns = {t: how for t, how in columns.items() if how[0] in (SHARE, *comparison.names)}
    sites = [name for name in comparison.names if name.startswith("r2 ")]
    columns |= {f"R² {name[3:]}": (name, "{:+.3f}") for name in sites}
    titles = ["less independent, at equal R²", *columns, "seeds with fewer", "at equal KL"]
    lines = ["\n", header(titles)]
    for group in comparison.groups:
        if not group.penalised:
            continue
        found = comparison.at_equal(group)
        cells = [cell(found[name], form) for name, form in columns.values()]
        told = [share for share in seeds[group.setting] if share == share]
        cells.append(f"{sum(share < 0 for share in told)} of {len(told)}")
        other = next(own for own in by_kl.groups if own.setting == group.setting)
        cells.append(cell(by_kl.at_equal(other)[SHARE], "{:+.1%}"))
        lines.append(row([group.setting, *cells]))
    return "".join(lines)


def controls_table(found: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The numbers of the controls."""
    columns = {"R²": ("r2", "{:.3f}"), "KL recovered": ("kl", "{:.3f}"), **COLUMNS}
    known = {name for numbers in found.values() for name in numbers}
    columns = {title: how for title, how in columns.items() if how[0] in known}
    lines = ["\n", header(["control", *columns])]
    for label, numbers in found.items():
        cells = [
            cell(numbers[name], form) if name in numbers else "" for name, form in columns.values()
        ]
        lines.append(row([label, *cells]))
    return "".join(lines)


def cell(values: Tensor, form: str) -> str:
    """A number with its interval; a dash where there is none."""
    if not bool(values[0].isfinite()):
        return "—"
    ends = interval_of(values)
    text = form.format(float(values[0]))
    if ends is not None:
        text += f" ({form.format(ends[0])} to {form.format(ends[1])})"
    return text.replace("-", "−").replace("%", " %")


def header(titles: Sequence[str]) -> str:
    """The first two lines of a table."""
    return row(titles) + row(["---"] * len(titles))


def row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    main(sys.argv[1:])
