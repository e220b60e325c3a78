"""Component freeze: walks in which a part of the model keeps the value it has at one end.

A part is held at the walked position, the last, at its value at A or at its value at B; everything
else runs freely. An attention, MLP or head is held by what it writes. A norm is held by the scale
that it divides by: what reads it is computed from the weights, with the norm folded in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuitlab import OptionError, Site
from circuitlab_activation_plateaus.sharpness.gates import Mlp, mlp_stream
from circuitlab_activation_plateaus.walks.bundle import STREAMS
from circuitlab_activation_plateaus.walks.walking import walk

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Tokens, TracedModel
    from circuitlab_activation_plateaus.walks.walking import Walks

#: What can be held: attentions, MLPs, norms, single heads.
KINDS = ("attn", "mlp", "ln", "heads")
PORTS = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class Part:
    """What is held together.

    Attributes:
        name: ``a1.h0``, ``m1``; ``a1`` for a whole attention; ``a1.norm``, ``m1.norm`` and
            ``logits.norm`` for the norms that these read through; ``all attention``, ``all MLPs``
            and ``all norms``.
        kind: ``head``, ``mlp``, ``attention``, ``norm`` or ``all``.
        layer: Its layer; the first one of several; ``n_layers`` for ``logits.norm``.
        head: The head of a single head.
        sites: What is written; none for norms.
        norms: Readers whose norms are held, in the order they run: ``a1``, ``m1``, ``logits``.
    """

    name: str
    kind: str
    layer: int
    head: int | None = None
    sites: tuple[Site, ...] = ()
    norms: tuple[str, ...] = ()


#: Holding it changes nothing.
NOTHING = Part("nothing", "none", 0)


def parts_after(model: TracedModel, site: Site, kinds: Collection[str] = KINDS) -> list[Part]:
    """All parts of some kinds that run after a site, in the order they run; sums at the end.

    Args:
        model: Any traced model.
        site: What is walked.
        kinds: Some of :data:`KINDS`.

    Raises:
        OptionError: the site is no residual stream, a kind is none of these, or nothing of these
            kinds runs after the site.
    """
    if site.kind not in STREAMS:
        raise OptionError(
            f"components are frozen along walks of a residual stream, not of {site}; give --site "
            f"resid_post.0 or the like"
        )
    for kind in kinds:
        if kind not in KINDS:
            raise OptionError(f"--freeze {kind!r} is no part; give some of {', '.join(KINDS)}")
    parts: list[Part] = []
    for layer in range(model.n_layers):
        # A reader that runs before the site, or is the site, sees nothing of the walk.
        attention = site < Site("q", layer)
        mlp = site < Site("mlp_post", layer)
        parts += _of_layer(model, layer, kinds, attention=attention, mlp=mlp)
    if "ln" in kinds:
        parts.append(Part("logits.norm", "norm", model.n_layers, None, (), ("logits",)))
    if not parts:
        raise OptionError(
            f"nothing of --freeze {', '.join(kinds)} runs after site {site}; walk an earlier site, "
            f"or leave --freeze out"
        )
    return [*parts, *_together(parts)]


def _of_layer(
    model: TracedModel, layer: int, kinds: Collection[str], *, attention: bool, mlp: bool
) -> Iterator[Part]:
    if attention and "ln" in kinds:
        yield Part(f"a{layer}.norm", "norm", layer, None, (), (f"a{layer}",))
    if attention and "heads" in kinds:
        for head in range(model.n_heads):
            site = Site("z", layer, head)
            yield Part(f"a{layer}.h{head}", "head", layer, head, (site,))
    if attention and "attn" in kinds:
        yield Part(f"a{layer}", "attention", layer, None, (Site("attn_out", layer),))
    if mlp and "ln" in kinds:
        yield Part(f"m{layer}.norm", "norm", layer, None, (), (f"m{layer}",))
    if mlp and "mlp" in kinds:
        yield Part(f"m{layer}", "mlp", layer, None, (Site("mlp_out", layer),))


def _together(parts: Sequence[Part]) -> Iterator[Part]:
    """All parts of a kind as one, where there is more than one."""
    names = {"attention": "all attention", "mlp": "all MLPs", "norm": "all norms"}
    for kind, name in names.items():
        some = [part for part in parts if part.kind == kind]
        if len(some) > 1:
            sites = tuple(site for part in some for site in part.sites)
            norms = tuple(norm for part in some for norm in part.norms)
            yield Part(name, "all", some[0].layer, None, sites, norms)


class Freezer:
    """Walks again and again along the same points, with one part held at a time.

    Args:
        model: Any traced model.
        tokens: Prompts of A, ``[n_rows, pos]``.
        site: What is walked, at the last position.
        points: ``[n_rows, n_steps, d_model]``, the first A, the last B.
        parts: What will be held.
        batch_size: Prompts per pass; None chooses by memory.
    """

    def __init__(
        self,
        model: TracedModel,
        tokens: Tokens,
        site: Site,
        points: Tensor,
        parts: Sequence[Part],
        batch_size: int | None = None,
    ) -> None:
        self._model, self._tokens, self._site = model, tokens, site
        self._points, self._batch_size = points, batch_size
        asked = {site for part in parts for site in part.sites}
        for part in parts:
            asked.update(_stream(model, norm) for norm in part.norms)
        ends = self._walk(points[:, [0, -1]], sorted(asked - {site}), {}, logits=False)
        self._ends = {**ends.read, site: points[:, [0, -1]]}

    def walk(self, part: Part, end: int) -> Tensor:
        """Centred logits with a part held, ``[n_rows, n_steps, vocab]``.

        Args:
            part: One of those given at the start.
            end: 0 to hold it at its value at A, 1 at that at B.

        Raises:
            ModelError: a norm of the part cannot be held.
        """
        hold = {site: self._ends[site][:, end] for site in part.sites}
        for norm in part.norms:
            site = _stream(self._model, norm)
            stream = self._points
            if site != self._site:
                stream = self._walk(self._points, [site], hold, logits=False).read[site]
            if norm == "logits":
                return self._logits(stream, end)
            hold |= self._held(norm, stream, end)
        return self._walk(self._points, [], hold).logits

    def _walk(
        self,
        points: Tensor,
        read: Sequence[Site],
        hold: dict[Site, Tensor],
        *,
        logits: bool = True,
    ) -> Walks:
        return walk(
            self._model,
            self._tokens,
            self._site,
            points,
            read=read,
            hold=hold or None,
            batch_size=self._batch_size,
            logits=logits,
        )

    def _logits(self, stream: Tensor, end: int) -> Tensor:
        """Centred logits of final streams, the final norm's scale held."""
        weights = self._model.weights
        scale = weights.norm_scale(None, self._ends[_stream(self._model, "logits")][:, [end]])
        weight, bias = weights.unembedding(stream.dtype)
        logits = stream / scale @ weight + bias
        return logits - logits.mean(-1, keepdim=True)

    def _held(self, norm: str, stream: Tensor, end: int) -> dict[Site, Tensor]:
        """What the readers of a norm give, its scale held, ``[n_rows, n_steps, width]`` each."""
        model, layer = self._model, int(norm[1:])
        at_end = self._ends[_stream(model, norm)][:, [end]]
        if norm.startswith("m"):
            mlp = Mlp(model, layer, stream.dtype)
            return {Site("mlp_out", layer): mlp.write(stream, mlp.scale(at_end))}
        plain, held = stream / model.weights.norm_scale(layer, at_end), {}
        weights = model.weights.folded(layer, stream.dtype)
        for port in PORTS:
            weight, bias = getattr(weights, port), getattr(weights, f"{port}_bias")
            n_heads = model.architecture.n_heads_of(port)
            group = model.n_heads // n_heads
            for head in range(n_heads):
                value = plain @ weight[head * group] + bias[head * group]
                held[Site(port, layer, head)] = value
        return held


def _stream(model: TracedModel, norm: str) -> Site:
    """The stream that the norm of a reader reads."""
    if norm == "logits":
        return Site("resid_post", model.n_layers - 1)
    if norm.startswith("a"):
        return Site("resid_pre", int(norm[1:]))
    return mlp_stream(model, int(norm[1:]))
