"""Walks: a model run with one activation moved along a path, thousands of steps in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from circuitlab import OptionError, ResourceError, Site, SiteError, Tokens, TracedModel, track
from circuitlab_activation_plateaus.walks.paths import Path
from circuitlab_activation_plateaus.walks.refining import Grid

#: Bytes of residual stream in one pass, by type of device. On a CPU what fits caches is fastest.
STREAMS = {"cpu": 3 * 2**20, "cuda": 128 * 2**20}
#: Bytes that logits may take in one pass, and over all steps together.
LOGITS_OF_A_PASS = 512 * 2**20
LOGITS = 8 * 2**30

#: From centred logits ``[n, vocab]`` and the prompts' row numbers ``[n]`` to what is kept of them,
#: ``[n, k]``.
Reduce = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Walks:
    """What a model did while one activation of each prompt moved along a path.

    Attributes:
        t: Places on the path, ``[n_rows, n_steps]``, float64, rising.
        points: What was written there, ``[n_rows, n_steps, d]``.
        read: By site, its value at each step, ``[n_rows, n_steps, width]``, at least float32.
        logits: ``[n_rows, n_steps, vocab]`` after the last token, less their mean over the
            vocabulary; ``[n_rows, n_steps, k]`` where they were reduced, ``[n_rows, n_steps, 0]``
            where none were asked for.
    """

    t: Tensor
    points: Tensor
    read: Mapping[Site, Tensor]
    logits: Tensor


def clean(
    model: TracedModel, tokens: Tokens, sites: Sequence[Site], position: int = -1
) -> dict[Site, Tensor]:
    """What the untouched model holds at some sites, ``[n_rows, width]`` each, at least float32.

    Args:
        model: Any traced model.
        tokens: ``n_rows`` prompts.
        sites: Where; a site with a position of its own is read there. A whole site of heads gives
            them side by side, ``n_heads * d_head`` wide. ``Site("logits")`` gives the logits after
            the last token, less their mean over the vocabulary.
        position: Where sites without one are read, negative from the end.

    Raises:
        OptionError: the position is padding in some prompt.
        SiteError: a site does not exist, or is a pattern.
    """
    places = {site: _placed(tokens, site, position) for site in sites if site.kind != "logits"}
    logits: Literal["last", "none"] = "none" if len(places) == len(sites) else "last"
    kept: dict[Site, Tensor] = {}
    size = _steps_at_once(model, tokens)
    for first in range(0, len(tokens), size):
        part = tokens.rows(slice(first, first + size)).trimmed()
        run = model.run(part, read=places.values(), logits=logits)
        for site in sites:
            place = places.get(site)
            value = _centred(run.logits[:, -1]) if place is None else run[place].flatten(1)
            _keep(kept, site, len(tokens), first, value)
    return kept


def walk(
    model: TracedModel,
    tokens: Tokens,
    site: Site,
    points: Tensor,
    *,
    t: Tensor | None = None,
    position: int = -1,
    read: Sequence[Site] = (),
    hold: Mapping[Site, Tensor] | None = None,
    batch_size: int | None = None,
    logits: bool = True,
    reduce: Reduce | None = None,
) -> Walks:
    """Run each prompt once for each of its points, with ``site`` replaced by the point.

    Every other position of ``site`` keeps the prompt's own clean value. One forward pass takes many
    steps, starts at ``site`` and unembeds the last position alone.

    Args:
        model: Any traced model.
        tokens: ``n_rows`` prompts.
        site: Where the points are written; one head or a whole site, without a position.
        points: ``[n_rows, n_steps, d]``.
        t: Places of the points, ``[n_steps]`` or ``[n_rows, n_steps]``; even from 0 to 1 where
            None.
        position: Where in the prompt, negative from the end.
        read: Sites to keep, at ``position`` or at their own; none before ``site``.
        hold: Values that components keep at ``position`` whatever the point, ``[n_rows, width]`` or
            ``[n_rows, n_steps, width]``; elsewhere the component keeps its clean value. For a
            component's freeze; the sites come after ``site``.
        batch_size: Steps per pass; chosen where None.
        logits: Whether logits are kept at all.
        reduce: What to keep of them, where all are too many: called with centred logits
            ``[n, vocab]`` and their prompts' rows ``[n]``, gives ``[n, k]``.

    Raises:
        OptionError: shapes do not go together, or the position is padding in some prompt.
        SiteError: a site does not exist, or comes before ``site``.
        ResourceError: all logits would need more than 8 GiB and ``reduce`` is not given.
        NumericsError: the logits hold NaN or infinity.
    """
    if points.ndim != 3 or len(points) != len(tokens):
        raise OptionError(
            f"points have shape {list(points.shape)} beside {len(tokens)} prompts; give "
            f"[n_rows, n_steps, d]"
        )
    if t is None:
        t = torch.linspace(0, 1, points.shape[1], dtype=torch.float64)
    begin = _begin(model, tokens, site, position, read, hold or {}, batch_size)
    return begin.walk(points, t, logits=logits, reduce=reduce)


def refined(
    model: TracedModel,
    tokens: Tokens,
    site: Site,
    path: Path,
    ends: tuple[Tensor, Tensor],
    *,
    steps: int = 51,
    refine: int = 0,
    position: int = -1,
    read: Sequence[Site] = (),
    hold: Mapping[Site, Tensor] | None = None,
    batch_size: int | None = None,
    reduce: Reduce | None = None,
) -> Walks:
    """Walk from one end to the other on an even grid, then look closer where the output is fastest.

    Each refinement halves, for every prompt, one interval: the one with the largest ∫v² of the
    speed v of what is kept of the logits, unless the halves were shorter than 1e-3 of the path. The
    steps of the result are in order of t and not even.

    Args:
        model: Any traced model.
        tokens: ``n_rows`` prompts.
        site: Where the points are written.
        path: One of ``PATHS``, or any function of its form.
        ends: ``(a, b)``, ``[n_rows, d]`` each.
        steps: Points of the even grid, both ends included; at least 3.
        refine: Points added to each prompt's grid.
        position: See :func:`walk`, as the rest.
        read: Sites to keep.
        hold: Values that components keep, ``[n_rows, width]``.
        batch_size: Steps per pass.
        reduce: What to keep of the logits.

    Returns:
        Walks of ``steps + refine`` steps.

    Raises:
        OptionError: fewer than 3 steps, refinements below 0, and what :func:`walk` refuses.
        SiteError: see :func:`walk`.
        NumericsError: see :func:`walk`.
    """
    if steps < 3 or refine < 0:
        raise OptionError(
            f"{steps} steps and {refine} refinements do not do; use 3 steps or more, and "
            f"refinements of 0 or more"
        )
    begin = _begin(model, tokens, site, position, read, hold or {}, batch_size)
    t = torch.linspace(0, 1, steps, dtype=torch.float64, device=model.device)
    t = t.expand(len(tokens), -1)
    walks = begin.walk(path(*ends, t), t, reduce=reduce)
    if not refine:
        return walks
    grid = Grid(walks.t, _parts(walks), refine)
    for _ in track(range(refine), "refining walks"):
        middle = grid.next()
        grid.add(middle, _parts(begin.walk(path(*ends, middle), middle, reduce=reduce)))
    parts = grid.parts()
    kept = {site: value for site, value in parts.items() if isinstance(site, Site)}
    return Walks(grid.t, parts["points"], kept, parts["logits"])


@dataclass(frozen=True, eq=False)
class _Begin:
    """What all walks of some prompts from one site share.

    ``own`` are whole clean values of the written sites, ``[n_rows, pos, ...]``; ``position`` is
    negative, so that it means the same in prompts cut on the left.
    """

    model: TracedModel
    tokens: Tokens
    site: Site
    position: int
    read: Mapping[Site, Site]
    own: Mapping[Site, Tensor]
    hold: Mapping[Site, Tensor]
    batch_size: int | None

    def walk(
        self, points: Tensor, t: Tensor, *, logits: bool = True, reduce: Reduce | None = None
    ) -> Walks:
        """Each prompt through its points ``[n_rows, n_steps, d]``."""
        n_rows, n_steps = points.shape[:2]
        if t.shape not in ((n_steps,), (n_rows, n_steps)):
            raise OptionError(
                f"places t have shape {list(t.shape)} beside points {list(points.shape)}; give "
                f"[n_steps] or [n_rows, n_steps]"
            )
        values = {
            site: self._steps(site, value, n_steps)
            for site, value in {self.site: points, **self.hold}.items()
        }
        if logits and reduce is None:
            _check_memory(n_rows * n_steps, self.model.vocab_size)
        kept = self._run(values, n_steps, "last" if logits else "none", reduce)
        found = {site: value.view(n_rows, n_steps, value.shape[1]) for site, value in kept.items()}
        last = found.pop(Site("logits"), points.new_empty(n_rows, n_steps, 0))
        return Walks(t.to(points.device).double().expand(n_rows, -1), points, found, last)

    def _run(
        self,
        values: Mapping[Site, Tensor],
        n_steps: int,
        ending: Literal["last", "none"],
        reduce: Reduce | None,
    ) -> dict[Site, Tensor]:
        """What is read, and the logits, ``[n_rows * n_steps, width]`` each."""
        kept: dict[Site, Tensor] = {}
        total = len(self.tokens) * n_steps
        every = torch.arange(total, device=self.model.device) // n_steps
        size = self.batch_size or _steps_at_once(self.model, self.tokens)
        batches = range(0, total, size)
        for first in track(batches, "walking") if len(batches) > 1 else batches:
            rows = every[first : first + size]
            part = self.tokens.rows(rows).trimmed()
            write = {
                site: self._written(site, value[first : first + size], rows, part.ids.shape[1])
                for site, value in values.items()
            }
            run = self.model.run(part, read=self.read.values(), write=write, logits=ending)
            for site, place in self.read.items():
                _keep(kept, site, total, first, run[place].flatten(1))
            if ending == "last":
                last = _centred(run.logits[:, -1])
                last = last if reduce is None else _reduced(reduce, last, rows)
                _keep(kept, Site("logits"), total, first, last)
        return kept

    def _steps(self, site: Site, value: Tensor, n_steps: int) -> Tensor:
        """Values of a site at each step, ``[n_rows * n_steps, width]``."""
        n_rows, width = len(self.tokens), self.own[site].shape[2:].numel()
        steps = value[:, None] if value.ndim == 2 and site != self.site else value
        try:
            return steps.expand(n_rows, n_steps, width).flatten(0, 1).to(self.model.device)
        except RuntimeError:
            raise OptionError(
                f"values at {site} have shape {list(value.shape)}; "
                f"give {[n_rows, n_steps, width]}, or {[n_rows, width]} where they are held"
            ) from None

    def _written(self, site: Site, value: Tensor, rows: Tensor, n_positions: int) -> Tensor:
        """The whole site with values ``[n, width]`` at the position, clean elsewhere."""
        whole = self.own[site][rows, -n_positions:]
        whole[:, self.position] = value.view_as(whole[:, self.position]).to(whole)
        return whole


def _begin(
    model: TracedModel,
    tokens: Tokens,
    site: Site,
    position: int,
    read: Sequence[Site],
    hold: Mapping[Site, Tensor],
    batch_size: int | None,
) -> _Begin:
    """Check what is asked, and read clean values of all that is written."""
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch size {batch_size} is too small; use 1 or more")
    for written in (site, *hold):
        if written.position is not None:
            raise SiteError(f"site {written} has its own position; give position= instead")
    for other in (*read, *hold):
        if other < site or (other == site and other in hold):
            raise SiteError(f"site {other} does not come after {site} and cannot answer to it")
    places = {other: _placed(tokens, other, position) for other in read}
    own: dict[Site, Tensor] = {}
    size = batch_size or _steps_at_once(model, tokens)
    for first in range(0, len(tokens), size):
        run = model.run(tokens.rows(slice(first, first + size)), read=[site, *hold], logits="none")
        for written in (site, *hold):
            _keep(own, written, len(tokens), first, run[written])
    at = _placed(tokens, site, position).position
    assert at is not None
    return _Begin(model, tokens, site, at, places, own, dict(hold), batch_size)


def _placed(tokens: Tokens, site: Site, position: int) -> Site:
    """The site at its own position or else the given one, counted from the end."""
    width = tokens.ids.shape[1]
    at = position if site.position is None else site.position
    if not -width <= at < width:
        raise OptionError(f"position {at} does not exist: the prompts have {width} positions")
    padded = ~tokens.mask[:, at]
    if padded.any():
        raise OptionError(
            f"position {at} is padding in prompt {int(padded.nonzero()[0]) + 1} of {len(padded)}; "
            f"count from the end, or take longer prompts"
        )
    return replace(site, position=at if at < 0 else at - width)


def _steps_at_once(model: TracedModel, tokens: Tokens) -> int:
    memory = STREAMS.get(model.device.type, STREAMS["cuda"])
    streams = memory // (tokens.ids.shape[1] * model.d_model * model.dtype.itemsize)
    return max(1, min(streams, LOGITS_OF_A_PASS // (4 * model.vocab_size)))


def _check_memory(n: int, vocab_size: int) -> None:
    needed = n * vocab_size * 4
    if needed > LOGITS:
        raise ResourceError(
            f"the logits of {n:,} steps would take {needed / 2**30:.1f} GiB; take fewer steps or "
            f"pairs, or keep less of them (reduce=)"
        )


def _centred(logits: Tensor) -> Tensor:
    """Logits less their mean over the vocabulary, at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide - wide.mean(-1, keepdim=True)


def _reduced(reduce: Reduce, logits: Tensor, rows: Tensor) -> Tensor:
    value = reduce(logits, rows)
    if value.ndim != 2 or len(value) != len(rows):
        raise OptionError(
            f"reduce gave {list(value.shape)} of the logits of {len(rows)} steps; give [n, k]"
        )
    return value


def _keep(kept: dict[Site, Tensor], site: Site, total: int, first: int, value: Tensor) -> None:
    """Put some of ``total`` rows into their place, without a second copy of all."""
    if site not in kept:
        dtype = torch.promote_types(value.dtype, torch.float32)
        kept[site] = value.new_empty(total, *value.shape[1:], dtype=dtype)
    kept[site][first : first + len(value)] = value


def _parts(walks: Walks) -> dict[str | Site, Tensor]:
    """All that a walk keeps of each step, by name or site."""
    parts: dict[str | Site, Tensor] = {"points": walks.points, "logits": walks.logits}
    return parts | dict(walks.read)
