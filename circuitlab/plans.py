"""From sites to a plan: the reads, writes and taps of one forward pass, as plain data in order.

A plan is a list of tuples of strings, integers, slices and tensors, sorted into execution order. It
is all that a trace executes, so an analysis never writes a trace and a plan can travel.

    ("skip", path, tensor)                       the module returns the tensor and is not run
    ("write", path, side, item, index, tensor)   what the module reads or returns, replaced there
    ("overwrite", path, side, item, index, tensor)  the same in place, for every reader of the value
    ("tap", path, side, item, how)               keep the value for differentiation
    ("read", path, side, item)                   keep the value, detached

``side`` is ``input``, ``output``, or ``branch``: the input as this reader alone sees it, which may
differ from the input itself. ``item`` picks from a tuple-valued output. ``how`` is ``leaf`` (the
graph starts here), ``branch`` (differentiate this reader only) or ``value``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from circuitlab.architectures import Architecture
from circuitlab.errors import SiteError
from circuitlab.sites import BLOCK_KINDS, HEAD_KINDS, Site
from circuitlab.wiring import PORTS

Step = tuple[Any, ...]
Plan = list[Step]


class Place(NamedTuple):
    """Where a site lives: a side of a module, and an item of it when that is a tuple."""

    path: str
    side: str
    item: int


@dataclass(frozen=True, slots=True)
class Locator:
    """Finds sites in a model, checks that they exist, and takes them out of what was read."""

    architecture: Architecture

    def check(self, site: Site) -> None:
        """Refuse a site that this model does not have.

        Raises:
            SiteError: names the site and the sizes of the model.
        """
        a = self.architecture
        if site.layer is not None and not 0 <= site.layer < a.n_layers:
            raise SiteError(f"site {site} does not exist: layers run from 0 to {a.n_layers - 1}")
        if site.head is not None and not 0 <= site.head < a.n_heads:
            raise SiteError(f"site {site} does not exist: heads run from 0 to {a.n_heads - 1}")
        if site.kind == "resid_mid" and a.parallel:
            raise SiteError(
                f"site {site} does not exist: attention and MLP of a {a.family} block run in "
                f"parallel; use resid_pre or resid_post"
            )

    def place(self, site: Site) -> Place:
        """The module, side and item that hold ``site``."""
        self.check(site)
        a, kind = self.architecture, site.kind
        if kind == "logits":
            raise SiteError("site logits is read as run.logits and cannot be written")
        if site.layer is None:
            return Place(a.embed, "output", 0)
        if kind in PORTS:
            return Place(a.block(site.layer, a.projection(kind).path), "output", 0)
        path, side, item = {
            "resid_pre": ("", "input", 0),
            "z": (a.output_projection, "input", 0),
            "pattern": (a.attention, "output", 1),
            "attn_out": (a.attention, "output", 0),
            "resid_mid": (a.mlp_norm, "input", 0),
            "mlp_in": (a.mlp_norm, "branch", 0),
            "mlp_out": (a.mlp, "output", 0),
            "resid_post": ("", "output", 0),
        }[kind]
        return Place(a.block(site.layer, path), side, item)

    def columns(self, site: Site, head: int) -> slice:
        """Columns of the place's last axis that belong to ``head``."""
        a = self.architecture
        offset, stride = 0, a.d_head
        if site.kind in PORTS:
            projection = a.projection(site.kind)
            offset, stride = projection.offset, projection.stride
        return slice(offset + head * stride, offset + head * stride + a.d_head)

    def view(self, site: Site, value: Tensor) -> Tensor:
        """The site's part of what was read at its place, in the site's own shape.

        Raises:
            SiteError: the position is outside the prompts.
        """
        _check_position(site, value.shape[1])
        if site.kind == "pattern":
            return value if site.head is None else value[:, site.head]
        if site.kind in HEAD_KINDS:
            value = self._heads(site, value)
            if site.head is not None:
                value = value[:, :, site.head]
        return value if site.position is None else value[:, site.position]

    def shape(self, site: Site, batch: int, pos: int) -> tuple[int, ...]:
        """Shape of the site in a run of ``batch`` prompts of ``pos`` tokens."""
        a = self.architecture
        if site.kind == "pattern":
            return (batch, pos, pos) if site.head is not None else (batch, a.n_heads, pos, pos)
        shape = [batch, pos, a.d_model]
        if site.kind in HEAD_KINDS:
            shape[2:] = [a.d_head] if site.head is not None else [a.n_heads, a.d_head]
        if site.position is not None:
            del shape[1]
        return tuple(shape)

    def fit(self, site: Site, tensor: Tensor, batch: int, pos: int) -> Tensor:
        """The tensor broadcast to the site's shape.

        Raises:
            SiteError: it does not fit, or the position is outside the prompts.
        """
        shape = self.shape(site, batch, pos)
        _check_position(site, pos)
        try:
            return tensor.expand(shape)
        except RuntimeError:
            raise SiteError(
                f"the value written at {site} has shape {list(tensor.shape)}; "
                f"it must broadcast to {site.shape}, here {list(shape)}"
            ) from None

    def writes(self, site: Site, tensor: Tensor) -> Iterable[Step]:
        """Steps that replace ``site`` by ``tensor``, which has the site's shape."""
        place = self.place(site)
        position: int | slice = slice(None) if site.position is None else site.position
        # A block keeps resid_mid for its skip connection before the MLP's norm reads it.
        op = "overwrite" if site.kind == "resid_mid" else "write"
        if site.kind == "pattern":
            raise SiteError(
                f"site {site} cannot be written: a model returns its pattern after using it; "
                f"write q, k or z"
            )
        if site.kind in HEAD_KINDS:
            heads = range(self.architecture.n_heads) if site.head is None else (site.head,)
            for head in heads:
                part = tensor[..., head, :] if site.head is None else tensor
                yield (op, *place, (slice(None), position, self.columns(site, head)), part)
        else:
            yield (op, *place, (slice(None), position), tensor)

    def _heads(self, site: Site, value: Tensor) -> Tensor:
        """``[batch, pos, width]`` of a projection or of z -> ``[batch, pos, n_heads, d_head]``."""
        a = self.architecture
        first = self.columns(site, 0)
        stride = self.columns(site, 1).start - first.start
        part = value[..., first.start : first.start + (a.n_heads - 1) * stride + a.d_head]
        return part.unfold(-1, a.d_head, stride)


def make_plan(
    locator: Locator,
    read: Iterable[Site],
    write: Mapping[Site, Tensor],
    tap: Iterable[Site],
) -> Plan:
    """The forward-ordered plan of some reads, writes and taps.

    A whole ``resid_pre`` that is written makes everything before it irrelevant: earlier blocks are
    skipped, as long as nothing there is read, written or tapped. A read shows what was written.
    """
    read, tap = sorted({site.whole for site in read}), sorted({site.whole for site in tap})
    steps: list[tuple[tuple[int, int, int], Step]] = []

    def add(site: Site, action: int, *new: Step) -> None:
        steps.extend(((*_moment(site), action), step) for step in new)

    for site, tensor in sorted(write.items(), key=lambda entry: entry[0].order):
        add(site, 0, *locator.writes(site, tensor))
    for number, site in enumerate(tap):
        how = "leaf" if number == 0 and not _is_branch(site) else "value"
        add(site, 1, ("tap", *locator.place(site), "branch" if _is_branch(site) else how))
    for site in read:
        add(site, 2, ("read", *locator.place(site)))
    plan = [step for _, step in sorted(steps, key=lambda entry: entry[0])]
    return _skips(locator.architecture, write, [*read, *tap, *write]) + plan


def _check_position(site: Site, pos: int) -> None:
    if site.position is not None and not -pos <= site.position < pos:
        raise SiteError(f"site {site} does not exist: the prompts have {pos} positions")


def _is_branch(site: Site) -> bool:
    return site.kind == "mlp_in"


def _moment(site: Site) -> tuple[int, int]:
    """Execution order of a site's place: sites at one place share it."""
    layer = -1 if site.layer is None else site.layer
    kind = {"pattern": "attn_out"}.get(site.kind, site.kind)
    return layer, BLOCK_KINDS.index(kind) if kind in BLOCK_KINDS else 0


def _skips(a: Architecture, write: Mapping[Site, Tensor], sites: Iterable[Site]) -> Plan:
    starts = [s.layer or 0 for s in write if s.kind == "resid_pre" and s.position is None]
    layer = max(starts, default=0)
    if layer == 0 or min(-1 if s.layer is None else s.layer for s in sites) < layer:
        return []
    return [("skip", a.block(earlier), write[Site("resid_pre", layer)]) for earlier in range(layer)]
