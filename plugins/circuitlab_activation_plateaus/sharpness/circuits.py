"""The sharpening circuit: which parts make the output jump, by holding each at A's or B's value.

Shinkle and Heimersheim (2025) hold a component at its mean over the steps, which moves the output
at both ends too. Here it is held at its value at A and, apart from that, at its value at B, and
both are told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import (
    Bar,
    Bars,
    CircuitGraph,
    ModelError,
    TaskError,
    check_cut,
    mean_intervals,
    track,
)
from circuitlab_activation_plateaus.comparison import number
from circuitlab_activation_plateaus.sharpness.freezing import (
    KINDS,
    NOTHING,
    Freezer,
    Part,
    parts_after,
)
from circuitlab_activation_plateaus.walks.bundle import LOGITS
from circuitlab_activation_plateaus.walks.paths import PATHS
from circuitlab_activation_plateaus.walks.responses import RESPONSES, apart, d_rel, d_sym, speed
from circuitlab_activation_plateaus.walks.summaries import summarise
from circuitlab_activation_plateaus.walks.walking import clean

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import TracedModel
    from circuitlab_activation_plateaus.walks.bundle import Settings
    from circuitlab_activation_plateaus.walks.pairs import Bank

#: Parts that the panel shows, and that a finding names.
SHOWN, NAMED = 8, 4
#: A step that is this share of the whole way is as steep as the grid can tell.
COARSE = 0.5


@dataclass(frozen=True, eq=False)
class Sharpness:
    """How sharp the output is by pair, ``[n_rows]`` each, float64; NaN where it does not move.

    Attributes:
        excess: Steepest slope of the response over that of the distance at the walked stream.
        participation: Participation ratio of the logits' speed.
        span: Distance between the logits at both ends of the walk; 0 where they do not move.
        step: Largest share of the response that lies in one step.
    """

    excess: Tensor
    participation: Tensor
    span: Tensor
    step: Tensor


@dataclass(frozen=True, eq=False)
class Freeze:
    """Sharpness with parts held, beside that of the free walk.

    Attributes:
        free: With nothing held.
        held: Of each part, held at A's value and at B's.
        not_held: Why other parts could not be, by name.
    """

    free: Sharpness
    held: Mapping[Part, tuple[Sharpness, Sharpness]]
    not_held: Mapping[str, str]


def freeze(model: TracedModel, bank: Bank, settings: Settings, parts: Sequence[Part]) -> Freeze:
    """Walk all pairs freely, then with each part held at either end, along the same points.

    Args:
        model: Any traced model.
        bank: The pairs; walks run in A's context, at the last position.
        settings: How walks are made; the grid is even, whatever ``refine`` says, so that held and
            free walks see the same points.
        parts: What :func:`.sharpness.freezing.parts_after` gave.
    """
    size = max(1, LOGITS // (8 * model.vocab_size * settings.steps))
    chunks = [bank.rows(slice(start, start + size)) for start in range(0, len(bank), size)]
    prepared = [_Chunk(model, chunk, settings, parts) for chunk in chunks]
    free = _joined([chunk.sharpness(NOTHING, 0) for chunk in prepared])
    held, not_held = {}, {}
    for part in track(parts, "holding components"):
        try:
            ends = [_joined([chunk.sharpness(part, end) for chunk in prepared]) for end in (0, 1)]
        except ModelError as error:
            not_held[part.name] = str(error)
        else:
            held[part] = (ends[0], ends[1])
    return Freeze(free, held, not_held)


class _Chunk:
    """Some pairs of a bank, ready to be walked with any part held."""

    def __init__(
        self, model: TracedModel, bank: Bank, settings: Settings, parts: Sequence[Part]
    ) -> None:
        a, b = (clean(model, side, [settings.site])[settings.site] for side in (bank.a, bank.b))
        differ = apart(torch.stack([a, b], 1))
        self._t = torch.linspace(0, 1, settings.steps, dtype=torch.float64, device=a.device)
        # Pairs whose ends are one point have no path: they stand still and count for nothing.
        points = a[:, None].repeat(1, settings.steps, 1)
        if differ.any():
            points[differ] = PATHS[settings.path](a[differ], b[differ], self._t)
        distance = d_sym if settings.response == "d-sym" else d_rel
        self._reference = torch.full_like(a[:, 0], torch.nan, dtype=torch.float64)
        if differ.any():
            inside = summarise(self._t, distance(points[differ]))
            self._reference[differ] = inside.max_slope
        self._response = RESPONSES[settings.response]
        self._freezer = Freezer(
            model, bank.a, settings.site, points, parts, batch_size=settings.batch_size
        )

    def sharpness(self, part: Part, end: int) -> Sharpness:
        logits = self._freezer.walk(part, end)
        span = (logits[:, -1] - logits[:, 0]).double().norm(dim=-1)
        rows = apart(logits) & ~self._reference.isnan()
        excess, participation, step = (torch.full_like(span, torch.nan) for _ in range(3))
        if rows.any():
            t, response = self._t, self._response(logits[rows])
            out = summarise(t, response, speed(t, logits[rows]))
            excess[rows] = out.max_slope / self._reference[rows]
            participation[rows] = out.participation
            step[rows] = out.max_slope * (t[1] - t[0])
        return Sharpness(excess, participation, torch.where(rows, span, 0.0), step)


def _joined(parts: Sequence[Sharpness]) -> Sharpness:
    names = [field.name for field in fields(Sharpness)]
    return Sharpness(**{n: torch.cat([getattr(part, n) for part in parts]).cpu() for n in names})


# --- the circuit ----------------------------------------------------------------------------------


def sharpening_circuit(
    model: TracedModel,
    bank: Bank,
    settings: Settings,
    *,
    kinds: Collection[str] = KINDS,
    top: int | Literal["all"] = 40,
    seed: int = 0,
) -> CircuitGraph:
    """Hold each part of a model while a stream is walked, and tell how much less sharply it jumps.

    Sharpness is the excess: the steepest slope of the response at the logits over that of the
    distance at the walked stream.

    Args:
        model: Any traced model.
        bank: The pairs; walks run in A's context, at the last position, and B's value of a part is
            that at the end of the walk.
        settings: How walks are made; see :func:`freeze`.
        kinds: Some of ``attn``, ``mlp``, ``ln``, ``heads``.
        top: How many components the circuit keeps, by the absolute score; or ``all``.
        seed: Of the intervals.

    Returns:
        Heads, MLPs and, where single heads are not asked for, whole attentions ``a1``, with their
        effect on ``logits``: ``score`` is the excess held - free, mean over both ends and over
        pairs, negative where the component sharpens; ``interval``; ``n_pairs``; ``a`` and ``b``
        have, for each end, the changes of ``excess`` (with its ``interval``) and of
        ``participation``, and ``span``, the distance that is left between the output's ends, as a
        share. ``graph["freezing"]`` has the same of all parts, strongest first, norms and sums of
        parts too; ``graph["excess_sharpness"]`` the free walk's; ``graph["still"]`` names parts
        without which no output moves, ``graph["not_held"]`` says why others could not be held.

    Raises:
        OptionError: an option is out of range, or nothing runs after the site.
        TaskError: in no pair the output moves.
    """
    check_cut(top, None)
    parts = parts_after(model, settings.site, kinds)
    found = freeze(model, bank, settings, parts)
    moving = ~found.free.excess.isnan()
    if not moving.any():
        raise TaskError(
            f"the output does not move between the ends of any of {len(bank)} pairs when "
            f"{settings.site} is walked; give other --pairs, or an earlier --site"
        )
    losses = {part.name: _loss(found, part, moving, seed) for part in found.held}
    told = [data for data in losses.values() if data is not None]
    told.sort(key=lambda data: (-abs(data["score"]), data["name"]))
    circuit = CircuitGraph(
        score=(
            f"excess sharpness (steepest slope of the logits' {settings.response} over that of "
            f"the walked stream) with the component held - free, mean over pairs and over holding "
            f"it at A's and at B's value; negative = it sharpens the jump"
        )
    )
    _add_components(circuit, model.n_layers, told, top)
    circuit.graph |= {
        "method": (
            f"{len(found.held)} parts held at their value at A and at B; {settings.path} at "
            f"{settings.site}, {settings.steps} points, {int(moving.sum())} pairs"
        ),
        "freezing": told,
    }
    if found.not_held:
        circuit.graph["not_held"] = dict(found.not_held)
    if still := [name for name, data in losses.items() if data is None]:
        circuit.graph["still"] = still
    _add_findings(circuit, found.free, moving, told, seed)
    _add_panel(circuit, told, settings.response)
    return circuit


def _loss(found: Freeze, part: Part, moving: Tensor, seed: int) -> dict[str, Any] | None:
    """A part's numbers as plain data; None where no output moves any more at both ends."""
    free, ends = found.free, found.held[part]
    rows = moving & ~ends[0].excess.isnan() & ~ends[1].excess.isnan()
    if not rows.any():
        return None
    changes = [(end.excess - free.excess)[rows] for end in ends]
    data: dict[str, Any] = {"name": part.name, "kind": part.kind, "layer": part.layer}
    if part.head is not None:
        data["head"] = part.head
    both = (changes[0] + changes[1]) / 2
    data |= {"score": float(both.mean()), "n_pairs": int(rows.sum())} | _interval(both, seed)
    for name, end, change in zip("ab", ends, changes, strict=True):
        participation = (end.participation - free.participation)[rows]
        data[name] = {
            "excess": float(change.mean()),
            "participation": float(participation.mean()),
            "span": float((end.span / free.span)[rows].mean()),
        } | _interval(change, seed)
    return data


def _interval(values: Tensor, seed: int) -> dict[str, list[float]]:
    interval = mean_intervals(values[None], seed)[0]
    return {} if interval is None else {"interval": list(interval)}


def _add_components(
    circuit: CircuitGraph,
    n_layers: int,
    told: Sequence[dict[str, Any]],
    top: int | Literal["all"],
) -> None:
    """The parts of the model that do not overlap, strongest first."""
    heads = any(data["kind"] == "head" for data in told)
    drawn = {"mlp", "head" if heads else "attention"}
    circuit.add_component("logits", kind="logits", layer=n_layers)
    for data in [data for data in told if data["kind"] in drawn][: None if top == "all" else top]:
        rest = dict(data)
        name, score = rest.pop("name"), rest.pop("score")
        component = {key: rest.pop(key) for key in ("kind", "layer", "head") if key in rest}
        circuit.add_component(name, **component)
        circuit.add_effect(name, "logits", score, **rest)


def _add_findings(
    circuit: CircuitGraph,
    free: Sharpness,
    moving: Tensor,
    told: Sequence[dict[str, Any]],
    seed: int,
) -> None:
    """The free walk's sharpness, and a line each for components, sums of them, norms, the grid."""
    before: dict[str, Any] = {"mean": float(free.excess[moving].mean())}
    before |= _interval(free.excess[moving], seed)
    circuit.graph["excess_sharpness"] = before
    said = {"excess sharpness": f"{number(before['mean'], before.get('interval'))} with none held"}
    labels = {
        "held one by one": ("head", "mlp", "attention"),
        "held together": ("all",),
        "norms held": ("norm",),
    }
    for label, kinds in labels.items():
        some = [data for data in told if data["kind"] in kinds][:NAMED]
        if some:
            said[label] = ", ".join(
                f"{data['name']} {number(data['score'], data.get('interval'), '+')}"
                for data in some
            )
    if still := circuit.graph.get("still"):
        said["still when held"] = f"{', '.join(still)}: the output moves no more"
    coarse = float((free.step[moving] >= COARSE).double().mean())
    if coarse:
        said["grid"] = (
            f"{coarse:.0%} of the pairs jump within one step, so their sharpness is at least what "
            f"is told; more --steps tell it better"
        )
    circuit.graph.setdefault("findings", {}).update(said)


def _add_panel(circuit: CircuitGraph, told: Sequence[dict[str, Any]], response: str) -> None:
    bars = []
    for data in told[:SHOWN]:
        for name in "ab":
            low, high = data[name].get("interval", (None, None))
            bars.append(
                Bar(
                    name=f"{data['name']} at {name.upper()}",
                    value=data[name]["excess"],
                    lo=low,
                    hi=high,
                    kind=f"held at {name.upper()}'s value",
                    note=f"span {data[name]['span']:.2f}",
                )
            )
    if bars:
        Bars(
            title="What makes the jump sharp",
            caption=(
                "Left: held, the output jumps less sharply. Span: distance that is left between "
                "the output's ends, as a share."
            ),
            what=f"change of excess sharpness ({response})",
            bars=bars,
        ).add_to(circuit)
