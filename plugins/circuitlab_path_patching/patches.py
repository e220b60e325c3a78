"""Patches: changes of the residual stream in which a component, or the stream, is another run's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import Site
from circuitlab_path_patching.paths.language import parse_components

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, Patcher, TracedModel

#: Texts of a position that are kept.
EXAMPLES = 5


@dataclass(frozen=True)
class Patch:
    """A change of the residual stream in which a component carries its other value.

    Attributes:
        name: Name of the component.
        site: Where it is added.
        change: What is added, ``[batch, pos, d_model]`` of a patcher.
        data: What its node says: ``kind``, ``layer`` and more.
    """

    name: str
    site: Site
    change: Callable[[Patcher], Tensor]
    data: dict[str, Any] = field(default_factory=dict)


def node_patches(model: TracedModel, senders: str | None = None) -> list[Patch]:
    """Each sender's other output in place of its own; all sources where none are named.

    Of a model of which only the blocks are known, sources are the embedding and whole blocks.

    Raises:
        OptionError: a sender does not exist.
        ModelError: senders are named, and only the blocks are known.
    """
    if model.architecture.blocks_only and senders is None:
        return _block_patches(model)
    names = parse_components(senders, model.wiring) if senders else list(model.wiring.sources)
    return [node_patch(model, name) for name in names]


def node_patch(model: TracedModel, source: str) -> Patch:
    """A source's other output in place of its own, seen by everything after it."""
    kind, layer, head = model.wiring.component(source)
    row = model.wiring.source_rows[source]
    data = {"kind": kind, "layer": layer} | ({} if head is None else {"head": head})
    return Patch(source, model.joins(source), lambda patcher: patcher.difference[row], data)


def stream_patches(model: TracedModel) -> list[Patch]:
    """The whole residual stream of the other run, before each attention, each MLP and the end.

    Of a model of which only the blocks are known, before each block and at the end.
    """
    if model.architecture.blocks_only:
        return [_stream_patch(Site("resid_pre", n), n + 1) for n in range(model.n_layers)] + [
            _stream_patch(Site("resid_post", model.n_layers - 1), model.n_layers + 1)
        ]
    wiring, found = model.wiring, []
    for block in wiring.blocks():
        if block.kind == "mlp" and wiring.parallel:
            continue
        kind = {"attention": "resid_pre", "mlp": "resid_mid", "logits": "resid_post"}[block.kind]
        site = Site(kind, min(block.layer, model.n_layers - 1))
        found.append(_stream_patch(site, block.n_sources))
    return found


def _stream_patch(site: Site, n_sources: int) -> Patch:
    """A site of the stream, where so many sources have written."""

    def change(patcher: Patcher) -> Tensor:
        return patcher.difference[:n_sources].sum(0)

    return Patch(str(site), site, change, {"kind": "residual", "layer": site.layer})


def _block_patches(model: TracedModel) -> list[Patch]:
    """What the embedding and each block as a whole adds to the stream, of the other run."""

    def change(row: int) -> Callable[[Patcher], Tensor]:
        return lambda patcher: patcher.difference[row]

    start = Patch("input", Site("resid_pre", 0), change(0), {"kind": "input", "layer": 0})
    blocks = [
        Patch(f"block{n}", Site("resid_post", n), change(n + 1), {"kind": "block", "layer": n})
        for n in range(model.n_layers)
    ]
    return [start, *blocks]


def at_positions(patch: Patch, pairs: EncodedTask) -> list[Patch]:
    """The same patch at each position alone."""
    width = pairs.clean.ids.shape[1]

    def only(position: int) -> Callable[[Patcher], Tensor]:
        def change(patcher: Patcher) -> Tensor:
            whole = patch.change(patcher)
            # A batch may be narrower than the task; its positions end where the task's do.
            place = position - width + whole.shape[1]
            if place < 0:
                return torch.zeros_like(whole)
            kept = torch.zeros_like(whole)
            kept[:, place] = whole[:, place]
            return kept

        return change

    return [
        Patch(f"{patch.name}[{name}]", patch.site, only(number), patch.data | data)
        for number, (name, data) in enumerate(columns(pairs))
    ]


def columns(pairs: EncodedTask) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each position: counted from the first, or from the end where lengths differ.

    ``token`` is the commonest text there in the clean prompts, ``tokens`` the commonest few where
    they differ.
    """
    texts = pairs.tokens_text
    width = pairs.clean.ids.shape[1]
    even = all(len(text) == width for text in texts)
    found = []
    for column in range(width):
        at = column if even else column - width
        seen = Counter(text[column - width] for text in texts if len(text) >= width - column)
        common = [token for token, _ in seen.most_common(EXAMPLES)]
        several = {"tokens": common} if len(common) > 1 else {}
        found.append((str(at), {"position": at, "token": common[0], **several}))
    return found
