"""From sites to a plan: the reads, writes and taps of one forward pass, as plain data in order.

A plan is a list of tuples of strings, integers, slices and tensors, sorted into execution order. It
is all that a trace executes, so an analysis never writes a trace and a plan can travel.

    ("skip", path, tensor, n)  the module is not run and returns the tensor, as the first of ``n``
                               outputs where ``n`` is not 0
    ("pass", path)             the module is not run and returns its input
    ("last", path)             the module reads the last position alone
    ("fork", path, reader)     so does the block, but for its norm, or its attention where it has
                               no norm before it, which reads all positions
    ("widen", path)            the module's output is repeated to all positions
    ("unembed", path, ids)     the unembedding gives the logits of these tokens
    ("write", path, side, item, index, tensor)   what the module reads or returns, replaced there
    ("overwrite", path, side, item, index, tensor)  the same in place, for every reader of the value
    ("tap", path, side, item, how)               keep the value for differentiation
    ("read", path, side, item)                   keep the value, detached

``side`` is ``input``, ``output``, or ``branch``: the input as this reader alone sees it, which may
differ from the input itself. ``item`` picks from a tuple-valued output. ``how`` is ``leaf`` (the
graph starts here), ``branch`` (differentiate this reader only) or ``value``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from circuitlab.architectures import STREAM_KINDS, Architecture
from circuitlab.errors import SiteError
from circuitlab.sites import BLOCK_KINDS, HEAD_KINDS, Site
from circuitlab.wiring import PORTS

Step = tuple[Any, ...]
Plan = list[Step]


class Ending(NamedTuple):
    """How much of the end of the forward pass is wanted.

    Attributes:
        last_only: Only the last position's logits.
        tokens: Only these tokens' logits, ``[n]``; None for all.
        stop: No logits at all: nothing after the last site is run.
    """

    last_only: bool = False
    tokens: Tensor | None = None
    stop: bool = False


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
            ModelError: the site is inside a block of which nothing is known.
        """
        a = self.architecture
        if site.kind not in STREAM_KINDS:
            a.described()
        if site.layer is not None and not 0 <= site.layer < a.n_layers:
            raise SiteError(f"site {site} does not exist: layers run from 0 to {a.n_layers - 1}")
        if site.head is not None and not 0 <= site.head < a.n_heads_of(site.kind):
            last = a.n_heads_of(site.kind) - 1
            raise SiteError(f"site {site} does not exist: heads run from 0 to {last}")
        if site.kind == "resid_mid" and a.parallel:
            raise SiteError(
                f"site {site} does not exist: attention and MLP of a {a.family} block run in "
                f"parallel; use resid_pre or resid_post"
            )
        if site.kind == "mlp_post" and not a.mlp_output_projection:
            raise SiteError(
                f"site {site} does not exist: the architecture of {a.family} names no output "
                f"projection of the MLP; set mlp_output_projection and d_mlp, or use mlp_out"
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
            "attn_out": (a.attention_post_norm or a.attention, "output", 0),
            "resid_mid": (a.mlp_entry, "input", 0),
            "mlp_in": (a.mlp_entry, "branch", 0),
            "mlp_post": (a.mlp_output_projection, "input", 0),
            "mlp_out": (a.mlp_post_norm or a.mlp, "output", 0),
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
        shape = [batch, pos, a.d_mlp if site.kind == "mlp_post" else a.d_model]
        if site.kind in HEAD_KINDS:
            n_heads = a.n_heads_of(site.kind)
            shape[2:] = [a.d_head] if site.head is not None else [n_heads, a.d_head]
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
            n_heads = self.architecture.n_heads_of(site.kind)
            heads = range(n_heads) if site.head is None else (site.head,)
            for head in heads:
                part = tensor[..., head, :] if site.head is None else tensor
                yield (op, *place, (slice(None), position, self.columns(site, head)), part)
        else:
            yield (op, *place, (slice(None), position), tensor)

    def joined(self, values: Mapping[Site, Tensor]) -> Tensor:
        """One projection's output ``[batch, pos, width]`` from the values of all its ports."""
        first = next(iter(values.values()))
        width = sum(value.shape[2] * value.shape[3] for value in values.values())
        whole = first.new_empty(*first.shape[:2], width)
        for site, value in values.items():
            self._heads(site, whole).copy_(value)
        return whole

    def _heads(self, site: Site, value: Tensor) -> Tensor:
        """``[batch, pos, width]`` of a projection or of z -> ``[batch, pos, n_heads, d_head]``."""
        a = self.architecture
        first = self.columns(site, 0)
        stride = self.columns(site, 1).start - first.start
        n_heads = a.n_heads_of(site.kind)
        part = value[..., first.start : first.start + (n_heads - 1) * stride + a.d_head]
        return part.unfold(-1, a.d_head, stride)


def make_plan(
    locator: Locator,
    read: Iterable[Site],
    write: Mapping[Site, Tensor],
    tap: Iterable[Site],
    ending: Ending | None = None,
) -> Plan:
    """The forward-ordered plan of some reads, writes and taps.

    A module whose whole output is written is not run, as long as nothing inside it is read, written
    or tapped: writing all of ``resid_pre`` skips the blocks before it, ``attn_out`` the attention.
    A read shows what was written.
    """
    ending = ending or Ending()
    asked = _Asked({site.whole for site in read}, write, {site.whole for site in tap})
    timed: list[tuple[tuple[int, int, int], Step]] = []

    def add(moment: tuple[int, int], action: int, *new: Step) -> None:
        timed.extend(((*moment, action), step) for step in new)

    skips, given = _skips(locator, asked, ending)
    for moment, step in skips:
        add(moment, 0, step)
    for site, tensor in sorted(write.items(), key=lambda entry: entry[0].order):
        if site not in given:
            add(_moment(site), 0, *locator.writes(site, tensor))
    for number, site in enumerate(sorted(asked.tap)):
        how = "leaf" if number == 0 and not _is_branch(site) else "value"
        step = ("tap", *locator.place(site), "branch" if _is_branch(site) else how)
        add(_moment(site), 1, step)
    for site in sorted(asked.read):
        add(_moment(site), 2, ("read", *locator.place(site)))
    for moment, step in _ends(locator.architecture, asked, ending):
        add(moment, 3, step)
    return [step for _, step in sorted(timed, key=lambda entry: entry[0])]


def _check_position(site: Site, pos: int) -> None:
    if site.position is not None and not -pos <= site.position < pos:
        raise SiteError(f"site {site} does not exist: the prompts have {pos} positions")


def _is_branch(site: Site) -> bool:
    return site.kind == "mlp_in"


def _moment(site: Site) -> tuple[int, int]:
    """Execution order of a site's place: sites at one place share it."""
    layer = -1 if site.layer is None else site.layer
    return layer, BLOCK_KINDS.index(site.kind) if site.kind in BLOCK_KINDS else 0


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a plan reads, writes and taps."""

    read: set[Site]
    write: Mapping[Site, Tensor]
    tap: set[Site]

    def at(self, layer: int, kinds: Collection[str]) -> set[Site]:
        """Sites of these kinds in a layer."""
        sites = (*self.read, *self.write, *self.tap)
        return {site for site in sites if site.layer == layer and site.kind in kinds}

    def alone(self, site: Site) -> bool:
        """Whether the whole site is written, and no part of it beside."""
        return {other for other in self.write if other.whole == site} == {site}


_INSIDE_ATTENTION = frozenset({"q", "k", "v", "z", "pattern"})
_AFTER_ATTENTION = frozenset(
    {"attn_out", "resid_mid", "mlp_in", "mlp_post", "mlp_out", "resid_post"}
)

_Timed = tuple[tuple[int, int], Step]


def _skips(locator: Locator, asked: _Asked, ending: Ending) -> tuple[list[_Timed], set[Site]]:
    """Steps for modules that need not run, and the written sites that these steps carry."""
    a = locator.architecture
    steps, given = _skipped_blocks(a, asked)
    for site, tensor in asked.write.items():
        if site in given or site in asked.tap or site.layer is None or not asked.alone(site):
            continue
        if site.kind == "attn_out" and not asked.at(site.layer, _INSIDE_ATTENTION):
            path, post_norm, n_outputs = a.attention, a.attention_post_norm, a.attention_outputs
            if site.layer == a.n_layers - 1 and _narrow(a, asked, ending):
                tensor = tensor[:, -1:]
            if a.attention_norm and a.attention_norm != a.mlp_norm:
                norm = a.block(site.layer, a.attention_norm)
                steps.append((_moment(Site("q", site.layer)), ("pass", norm)))
        elif site.kind == "mlp_out" and not asked.at(site.layer, {"mlp_post"}):
            path, post_norm, n_outputs = a.mlp, a.mlp_post_norm, 0
        else:
            continue
        given.add(site)
        steps.append((_moment(site), ("skip", a.block(site.layer, path), tensor, n_outputs)))
        if post_norm:
            steps.append((_moment(site), ("skip", a.block(site.layer, post_norm), tensor, 0)))
    for layer in {site.layer for site in asked.write if site.kind in PORTS}:
        assert layer is not None
        for path in sorted({a.projection(port).path for port in PORTS}):
            ports = [Site(p, layer) for p in PORTS if a.projection(p).path == path]
            if all(asked.alone(site) and site not in asked.tap for site in ports):
                joined = locator.joined({site: asked.write[site] for site in ports})
                given.update(ports)
                # Before the first of them is read or asked for.
                steps.append((_moment(ports[0]), ("skip", a.block(layer, path), joined, 0)))
    return steps, given


def _skipped_blocks(a: Architecture, asked: _Asked) -> tuple[list[_Timed], set[Site]]:
    """Blocks before a residual stream that is written whole, unless something there is asked."""
    start, carried = 0, None
    for site in asked.write:
        first = {"resid_pre": 0, "resid_post": 1}.get(site.kind)
        if first is not None and asked.alone(site) and (site.layer or 0) + first > start:
            start, carried = (site.layer or 0) + first, site
    if carried is None:
        return [], set()
    others = {*asked.read, *asked.write, *asked.tap} - {Site("resid_post", start - 1)}
    if min((-1 if s.layer is None else s.layer for s in others), default=start) < start:
        return [], set()
    value = asked.write[carried]
    n_outputs = a.block_outputs
    steps = [((layer, -1), ("skip", a.block(layer), value, n_outputs)) for layer in range(start)]
    if not a.blocks_only:  # there the embedding may be of another width than the stream
        nothing = value.new_zeros(1, 1, 1).expand_as(value)
        steps.append(((-1, 0), ("skip", a.embed, nothing, 0)))
    return steps, {carried} - asked.tap


def _ends(a: Architecture, asked: _Asked, ending: Ending) -> Iterator[_Timed]:
    """Steps that leave out what nobody looks at after the last site."""
    sites = {*asked.read, *asked.write, *asked.tap}
    last = a.n_layers - 1
    after = _AFTER_ATTENTION
    if a.blocks_only:
        if ending.tokens is not None and not ending.stop:
            yield (a.n_layers, 0), ("unembed", a.unembedding, ending.tokens)
        return
    if ending.stop:
        last = max((site.layer for site in sites if site.layer is not None), default=-1)
        for layer in range(last + 1, a.n_layers):
            yield (layer, -1), ("pass", a.block(layer))
        yield (a.n_layers, 0), ("pass", a.unembedding)
        if last >= 0 and not asked.at(last, after - {"attn_out"}):
            yield (last, BLOCK_KINDS.index("mlp_out")), ("pass", a.block(last, a.mlp))
        if last >= 0 and not asked.at(last, after):
            yield (last, BLOCK_KINDS.index("z")), ("last", a.block(last, a.output_projection))
        return
    if ending.tokens is not None:
        yield (a.n_layers, 0), ("unembed", a.unembedding, ending.tokens)
    if _narrow(a, asked, ending):
        # What only the last position's logits depend on is computed for the last position.
        if not asked.at(last, {"attn_out"}):
            yield (last, 0), ("fork", a.block(last), a.block(last, a.attention_entry))
            yield (last, BLOCK_KINDS.index("z")), ("last", a.block(last, a.output_projection))
        else:
            yield (last, 0), ("last", a.block(last))
        yield (a.n_layers, -1), ("widen", a.final_norm)
    elif ending.last_only and not asked.tap and not asked.at(last, after - {"attn_out", "mlp_in"}):
        # Adding it to a longer stream broadcasts; what that gives elsewhere nobody reads.
        yield (last, BLOCK_KINDS.index("mlp_in")), ("last", a.block(last, a.mlp_entry))


def _narrow(a: Architecture, asked: _Asked, ending: Ending) -> bool:
    """Whether the last block can give the last position alone."""
    last = a.n_layers - 1
    if not ending.last_only or ending.stop or asked.tap or a.blocks_only:
        return False
    here = asked.at(last, _AFTER_ATTENTION)
    out = Site("attn_out", last)
    return not here or (here == {out} and out not in asked.read and asked.alone(out))
