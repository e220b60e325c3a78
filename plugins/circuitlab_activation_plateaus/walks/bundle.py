"""A bundle of curves: how far a model's output has come at each step from A to B, by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import OptionError, Site, TaskError, mean_intervals, track
from circuitlab_activation_plateaus.walks.paths import PATHS
from circuitlab_activation_plateaus.walks.responses import RESPONSES, apart, d_rel, d_sym, speed
from circuitlab_activation_plateaus.walks.summaries import Summary, summarise
from circuitlab_activation_plateaus.walks.walking import clean, refined

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Interval, TracedModel
    from circuitlab_activation_plateaus.walks.pairs import Bank
    from circuitlab_activation_plateaus.walks.walking import Reduce, Walks

STREAMS = ("resid_pre", "resid_mid", "resid_post")
#: Responses that are distances between logits.
DISTANCES = ("d-sym", "d-rel")
#: A vocabulary is large from so many times the width of the stream on.
LARGE = 8
#: Bytes that the logits of walks that are looked at together may take, where curves are all.
LOGITS = 512 * 2**20
#: Below every distance.
TINY = 1e-300


@dataclass(frozen=True)
class Settings:
    """How walks are made and answered.

    Attributes:
        site: The stream that is replaced, at the last position.
        path: One of ``PATHS``.
        response: One of ``RESPONSES``, of the centred logits after the last token.
        steps: Points of the even grid.
        refine: Times the steepest interval is halved.
        batch_size: Steps per pass; None chooses.
    """

    site: Site
    path: str = "slerp"
    response: str = "d-sym"
    steps: int = 51
    refine: int = 4
    batch_size: int | None = None


@dataclass(frozen=True, eq=False)
class Bundle:
    """What one model answered on the pairs it tells apart, ``n_rows`` of a bank's.

    Attributes:
        rows: Their rows in the bank.
        t: Places, ``[n_rows, n_steps]``, rising from 0 to 1, not even.
        response: At the logits, ``[n_rows, n_steps]``.
        reference: The same distance at the site itself: ``d_sym`` for the response ``d-sym``, else
            ``d_rel``.
        out: Summary of the response, with the speed of the centred logits.
        inside: Summary of the reference, with the speed of the points.
        reach: How far the output goes along the walk, as a share of the distance between what the
            prompts A and B give, ``[n_rows]``: 1 where they differ in the last token alone.
        misfit: Distance of the logits at the end of a walk from those of B, as a share of their
            norm, ``[n_rows]``; rounding where A and B differ in the last token alone.
        walks: All walks, also of pairs that are not told apart; None where nothing was read.
    """

    rows: list[int]
    t: Tensor
    response: Tensor
    reference: Tensor
    out: Summary
    inside: Summary
    reach: Tensor
    misfit: Tensor
    walks: Walks | None = None

    def of(self, rows: Sequence[int]) -> Bundle:
        """The curves of these rows of the bank, all of which it has; without walks."""
        places = [self.rows.index(row) for row in rows]
        return _remade([self], list(rows), lambda parts: parts[0][places])


def parse_stream(text: str, n_layers: int, flag: str = "--site") -> Site:
    """The residual stream that a text such as ``resid_post.0`` names.

    Raises:
        OptionError: it names no residual stream of a model of so many layers.
    """
    kind, _, layer = text.strip().partition(".")
    if kind not in STREAMS or not layer.isdecimal() or int(layer) >= n_layers:
        raise OptionError(
            f"{flag} {text!r} is no residual stream of this model of {n_layers} layers; give one "
            f"of {', '.join(STREAMS)} with a layer, such as resid_post.0"
        )
    return Site(kind, int(layer))


def parse_site(text: str, n_layers: int, path: str = "lerp") -> Site:
    """The stream to walk, as the next block reads it where there is one.

    Args:
        text: Such as ``resid_post.0``, which is ``resid_pre.1``.
        n_layers: Of the model.
        path: ``embed`` walks through the embeddings: the site is ``resid_pre.0`` whatever the text.

    Raises:
        OptionError: it names no residual stream of the model.
    """
    site = parse_stream(text, n_layers)
    if path == "embed":
        return Site("resid_pre", 0)
    if site.kind == "resid_post" and site.layer is not None and site.layer + 1 < n_layers:
        return Site("resid_pre", site.layer + 1)
    return site


def measure(
    model: TracedModel,
    bank: Bank,
    settings: Settings,
    what: str,
    *,
    read: Sequence[Site] | None = None,
) -> Bundle:
    """Walk from A to B of every pair, in the context of A.

    Pairs whose ends are one point to rounding, at the site or at the logits, have no curve and are
    left out.

    Args:
        model: Any traced model.
        bank: The pairs.
        settings: How.
        what: What is measured, for the progress.
        read: Sites to keep along the walks, which are then part of the bundle; None for curves
            alone, a few pairs at a time.

    Raises:
        TaskError: no pair is left.
        OptionError: the path cannot join the ends of some pair.
        NumericsError: the model's logits hold NaN or infinity.
    """
    reduce = compact(model) if settings.response in DISTANCES else None
    size = len(bank)
    if read is None:
        width = model.vocab_size if reduce is None else model.d_model
        size = max(1, LOGITS // (8 * width * (settings.steps + settings.refine)))
    starts = range(0, len(bank), size)
    parts = [
        _measure(model, bank.rows(slice(start, start + size)), settings, reduce, read, start)
        for start in track(starts, what)
    ]
    found = [part for part in parts if part is not None]
    if not found:
        raise TaskError(
            f"{model.name}: none of the {len(bank)} pairs ({bank.kind}) has two different outputs "
            f"when {settings.site} is replaced at the last position; give other --pairs, or an "
            f"earlier --site"
        )
    if len(found) == 1:
        return found[0]
    return _remade(found, [row for part in found for row in part.rows], torch.cat)


def compact(model: TracedModel) -> Reduce | None:
    """Centred logits in an orthonormal basis of where their differences lie, ``[n, d_model]``.

    Distances between logits are the same there, and of large vocabularies they need a small part of
    the memory. None for a vocabulary that is not large, and where logits may be more than a linear
    map: a cap bends them out of that space, and a model of which the blocks alone are known may.
    """
    bent = model.architecture.blocks_only or model.architecture.logit_softcap
    if bent or model.vocab_size <= LARGE * model.d_model:
        return None
    weight = model.weights.unembedding(torch.promote_types(model.dtype, torch.float32))[0]
    basis = torch.linalg.qr((weight - weight.mean(-1, keepdim=True)).T).Q

    def reduce(logits: Tensor, rows: Tensor) -> Tensor:
        kept: Tensor = logits @ basis
        return kept

    return reduce


def _measure(
    model: TracedModel,
    bank: Bank,
    settings: Settings,
    reduce: Reduce | None,
    read: Sequence[Site] | None,
    first: int,
) -> Bundle | None:
    """Curves of a few pairs, the first of which is row ``first`` of the bank."""
    site, logits = settings.site, Site("logits")
    ends = [clean(model, tokens, [site, logits]) for tokens in (bank.a, bank.b)]
    differ = apart(torch.stack([end[site] for end in ends], 1))
    if not differ.any():
        return None
    a, b = ({place: value[differ] for place, value in end.items()} for end in ends)
    rows = differ.nonzero()[:, 0].tolist()
    walks = refined(
        model,
        bank.rows(rows).a,
        site,
        PATHS[settings.path],
        (a[site], b[site]),
        steps=settings.steps,
        refine=settings.refine,
        read=read or (),
        batch_size=settings.batch_size,
        reduce=reduce,
    )
    told = apart(walks.logits)
    if not told.any():
        return None
    t, values, points = walks.t[told], walks.logits[told], walks.points[told]
    response = RESPONSES[settings.response](values)
    reference = (d_sym if settings.response == "d-sym" else d_rel)(points)
    clean_ends = [end[logits][told] for end in (a, b)]
    if reduce is not None:
        clean_ends = [reduce(end, told) for end in clean_ends]
    start, target = (end.double() for end in clean_ends)
    end = values[:, -1].double()
    whole, size = (target - start).norm(dim=-1), target.norm(dim=-1)
    return Bundle(
        rows=[first + row for row, kept in zip(rows, told.tolist(), strict=True) if kept],
        t=t,
        response=response,
        reference=reference,
        out=summarise(t, response, speed(t, values)),
        inside=summarise(t, reference, speed(t, points)),
        reach=(end - start).norm(dim=-1) / whole.clamp(min=TINY),
        misfit=(end - target).norm(dim=-1) / size.clamp(min=TINY),
        walks=None if read is None else walks,
    )


def _remade(
    bundles: Sequence[Bundle], rows: list[int], change: Callable[[list[Tensor]], Tensor]
) -> Bundle:
    """A bundle whose every tensor is made of those of other bundles; without walks."""

    def summary(name: str) -> Summary:
        found = [getattr(bundle, name) for bundle in bundles]
        names = [field.name for field in fields(Summary)]
        return Summary(**{each: change([getattr(one, each) for one in found]) for each in names})

    names = ("t", "response", "reference", "reach", "misfit")
    tensors: dict[str, Any] = {
        name: change([getattr(bundle, name) for bundle in bundles]) for name in names
    }
    return Bundle(rows=rows, out=summary("out"), inside=summary("inside"), **tensors)


def on_grid(t: Tensor, values: Tensor, grid: Tensor) -> Tensor:
    """Bundle at the places of one grid, ``[n_rows, n_grid]``, linear between steps.

    Args:
        t: Places of each curve, ``[n_rows, n_steps]``, rising.
        values: ``[n_rows, n_steps]``.
        grid: ``[n_grid]``, within every row of ``t``.
    """
    wanted = grid.to(t).expand(len(t), -1).contiguous()
    right = torch.searchsorted(t.contiguous(), wanted).clamp(1, t.shape[1] - 1)
    low, high = t.gather(1, right - 1), t.gather(1, right)
    share = (wanted - low) / (high - low)
    return torch.lerp(values.gather(1, right - 1), values.gather(1, right), share.to(values))


def bands(values: Tensor, seed: int = 0) -> tuple[list[float], list[float], list[float]]:
    """Mean over pairs of ``[n_pairs, n]``, and the ends of its interval, ``[n]`` each."""
    means = values.double().mean(0).tolist()
    found: list[Interval | None] = mean_intervals(values.double().T.cpu(), seed)
    ends = [interval or (mean, mean) for interval, mean in zip(found, means, strict=True)]
    return means, [low for low, _ in ends], [high for _, high in ends]
