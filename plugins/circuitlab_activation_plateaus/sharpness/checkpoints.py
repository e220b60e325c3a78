"""Checkpoints: the same pairs walked in every saved step of a training run, as small multiples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import Curve, Curves, ModelError, OptionError, TaskError, load_model, track
from circuitlab_activation_plateaus.comparison import LABELS, middle, number, values
from circuitlab_activation_plateaus.walks.bundle import bands, measure, on_grid
from circuitlab_activation_plateaus.walks.medians import median_interval

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, TracedModel
    from circuitlab_activation_plateaus.walks.bundle import Settings
    from circuitlab_activation_plateaus.walks.pairs import Bank

_NUMBER = re.compile(r"\d+")


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """The model folders in a folder, sorted by the last number in their names.

    A folder with a ``config.json`` is a model folder; others are passed over.

    Raises:
        OptionError: there is none, or two have the same number, or one has none.
    """
    found: dict[int, Path] = {}
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    for place in places:
        if not (place / "config.json").is_file():
            continue
        numbers = _NUMBER.findall(place.name)
        if not numbers:
            raise OptionError(
                f"--checkpoints {folder}: folder {place.name!r} has no number in its name; call it "
                f"after its step, such as step-000200"
            )
        step = int(numbers[-1])
        if step in found:
            raise OptionError(
                f"--checkpoints {folder}: {found[step].name!r} and {place.name!r} are both step "
                f"{step}; rename one"
            )
        found[step] = place
    if not found:
        raise OptionError(
            f"--checkpoints {folder} holds no model folders; save each step with save_pretrained "
            f"in a folder of its own, such as step-000200"
        )
    return sorted(found.items())


def add_checkpoints(
    circuit: CircuitGraph,
    model: TracedModel,
    bank: Bank,
    folder: Path,
    settings: Settings,
    seed: int = 0,
) -> None:
    """Walk the same pairs in each model of a training run.

    Args:
        circuit: Gets ``graph["checkpoints"]``: places ``t`` and, of each of ``models``, its
            ``step``, ``n_pairs`` (those whose output moves), mean ``curve`` of the response, the
            medians over pairs of ``max_slope``, ``width`` and ``excess`` with their intervals, and
            the mean number of ``boundaries``; a finding and two panels.
        model: The model that is analysed, to which the others must fit.
        bank: The pairs.
        folder: Holds one model folder for each checkpoint.
        settings: How walks are made.
        seed: Of the intervals.

    Raises:
        OptionError: the folder does not hold models with a number each.
        ModelError: a model cannot be loaded, or is not one of the same run.
    """
    measured: list[dict[str, Any]] = []
    dtype: Any = str(model.dtype).removeprefix("torch.")
    for step, place in track(checkpoint_folders(folder), "walking in checkpoints"):
        one = load_model(str(place), device=str(model.device), dtype=dtype)
        _check_same(model, one, bank, place)
        measured.append({"step": step} | _walked(one, bank, settings, seed))
    t = _grid(settings).tolist()
    circuit.graph["checkpoints"] = {"t": t, "response": settings.response, "models": measured}
    known = [data for data in measured if data["n_pairs"]]
    if known:
        circuit.graph.setdefault("findings", {})["checkpoints"] = _said(known)
        _add_panels(circuit, t, known, settings.response)


def _check_same(model: TracedModel, one: TracedModel, bank: Bank, place: Path) -> None:
    """Refuse a model that reads other tokens, or has another shape."""
    for name in ("vocab_size", "n_layers", "n_heads", "d_model"):
        mine, other = getattr(model, name), getattr(one, name)
        if mine != other:
            raise ModelError(
                f"checkpoint {place}: {name} is {other}, that of model {model.name!r} is {mine}; "
                f"give checkpoints of the model's own training run"
            )
    if model.tokenizer is None or one.tokenizer is None:
        return
    ids = sorted({token for side in (bank.a, bank.b) for token in side.ids[side.mask].tolist()})
    if model.token_texts(ids) != one.token_texts(ids):
        raise ModelError(
            f"checkpoint {place}: its tokenizer reads the pairs' tokens as other texts than that "
            f"of model {model.name!r}; save the run's own tokenizer with it, or none"
        )


def _walked(model: TracedModel, bank: Bank, settings: Settings, seed: int) -> dict[str, Any]:
    """One model's curve and numbers; none where its output moves in no pair."""
    try:
        found = measure(model, bank, settings, "walking")
    except TaskError:
        return {"n_pairs": 0}
    mean, lo, hi = bands(on_grid(found.t, found.response, _grid(settings).to(found.t)), seed)
    data: dict[str, Any] = {"n_pairs": len(found.rows)}
    data["curve"] = {"mean": mean, "lo": lo, "hi": hi}
    for name in ("max_slope", "width", "excess"):
        each = values(found, name)
        interval = median_interval(each, seed)
        data[name] = {"median": middle(each)}
        data[name] |= {} if interval is None else {"interval": list(interval)}
    return data | {"boundaries": float(values(found, "boundaries").mean())}


def _grid(settings: Settings) -> Tensor:
    return torch.linspace(0, 1, settings.steps, dtype=torch.float64)


def _said(known: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last model's sharpness."""
    ends = [known[0], known[-1]] if len(known) > 1 else known
    told = [
        f"{number(data['excess']['median'], data['excess'].get('interval'))} at step {data['step']}"
        for data in ends
    ]
    return f"excess sharpness {', '.join(told)}"


def _add_panels(
    circuit: CircuitGraph, t: Sequence[float], known: Sequence[Mapping[str, Any]], response: str
) -> None:
    Curves(
        title="Through training",
        caption="The way from A to B at each saved step, mean over pairs; beside it, the median "
        "excess sharpness.",
        x=t,
        x_label="t, from A to B",
        y_label=LABELS[response].partition("; ")[0],
        curves=[
            Curve(
                name=f"step {data['step']}",
                note=f"excess {data['excess']['median']:.2f}",
                **data["curve"],
            )
            for data in known
        ],
        apart=True,
    ).add_to(circuit)
    if len(known) < 2:
        return
    ends = [data["excess"].get("interval") for data in known]
    band: dict[str, Any] = (
        {} if None in ends else {"lo": [e[0] for e in ends], "hi": [e[1] for e in ends]}
    )
    means = [data["excess"]["median"] for data in known]
    Curves(
        title="Sharpness through training",
        caption="1 is as sharp as the walked stream itself.",
        x=[float(data["step"]) for data in known],
        x_label="training step",
        y_label="excess sharpness, median over pairs",
        curves=[Curve(name="excess sharpness", mean=means, **band)],
    ).add_to(circuit)
