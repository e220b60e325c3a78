"""Gathering: activity of latents and attributions between them, over a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from circuitlab import DictionaryStats, ModelError, OptionError, distinct_rows, track
from circuitlab_feature_interactions.data import PromptStream, pad
from circuitlab_feature_interactions.edges import EdgeSums, Events, SparseSums
from circuitlab_feature_interactions.interactions import make_route
from circuitlab_feature_interactions.sites import sites_of, written_site

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from circuitlab import Dictionary, EncodedTask, Run, Site, Tokens, TracedModel
    from circuitlab_feature_interactions.interactions import Attributions, Route
    from circuitlab_feature_interactions.sites import Pair

#: Seed of the data's order; dictionaries are trained on others.
SEED = 1 << 20
#: Parts of what a latent does to another; the first two are the ports of edges.
COMPUTED, SKIP, LOCAL, TOTAL = "", "skip", "local", "total"
#: Tokens of a pass, padding included, where no batch size is given.
PASS = 1024


class Activity:
    """When latents of one site are active, and how well they reconstruct what they should.

    Args:
        dictionary: Of the site; a transcoder reconstructs another.

    Attributes:
        stats: Reconstruction, active latents per token, densities.
        total: Sum of each latent, ``[n]``, float64.
        largest: Its largest value, ``[n]``, float64.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        self.n = dictionary.n
        self.stats = DictionaryStats(dictionary.n)
        self.total = torch.zeros(dictionary.n, dtype=torch.float64)
        self.largest = torch.zeros(dictionary.n, dtype=torch.float64)
        self._tokens = SparseSums(2)
        self._vocab = 1

    def add(
        self,
        dictionary: Dictionary,
        x: Tensor,
        tokens: Tokens,
        vocab_size: int,
        target: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            dictionary: Of the site.
            x: The site's values, ``[batch, pos, width]``.
            tokens: Where they are of.
            vocab_size: Of the model.
            target: What a transcoder should write there, ``[batch, pos, d_out]``; None for ``x``.
        """
        self._vocab = vocab_size
        index, values = dictionary.active(x)
        written = dictionary.decode_active(index, values, x)
        self.stats.add(x if target is None else target, (index, values), written, mask=tokens.mask)
        where = tokens.mask[..., None] & (values != 0)
        latents, sizes = index[where], values[where].double()
        ids = tokens.ids[..., None].expand_as(index)[where]
        sums = torch.stack([torch.ones_like(sizes), sizes], 1)
        self._tokens.add(latents * vocab_size + ids, sums)
        latents, sizes = latents.cpu(), sizes.cpu()
        self.total.index_add_(0, latents, sizes)
        self.largest.scatter_reduce_(0, latents, sizes, "amax")

    def mean(self, latent: int) -> float:
        """Mean of a latent where it is active; 0 where it never was."""
        count = float(self.stats.densities[latent]) * self.stats.tokens
        return float(self.total[latent]) / count if count else 0.0

    def top_tokens(self, latent: int, n: int) -> list[tuple[int, float]]:
        """Tokens at which a latent is largest in the mean over those where it is active."""
        ends = torch.tensor([latent, latent + 1]) * self._vocab
        start, end = torch.searchsorted(self._tokens.keys, ends).tolist()
        count, total = self._tokens.sums[start:end].unbind(1)
        means = total / count
        order = means.argsort(descending=True, stable=True)[:n]
        ids = (self._tokens.keys[start:end] - latent * self._vocab)[order]
        return list(zip(ids.tolist(), means[order].tolist(), strict=True))


@dataclass
class Interactions:
    """What latents of a pair of sites do to one another.

    Attributes:
        pair: The sites.
        sums: By part: :data:`COMPUTED`; for blocks and transcoders also :data:`LOCAL`, what of it
            comes through no attention; for blocks :data:`SKIP`, what the residual stream carries,
            and :data:`TOTAL`, computed and carried.
    """

    pair: Pair
    sums: dict[str, EdgeSums] = field(default_factory=dict)

    @property
    def whole(self) -> EdgeSums:
        """Everything that a source latent does to a target latent."""
        return self.sums.get(TOTAL, self.sums[COMPUTED])


@dataclass
class Gathered:
    """All statistics over a data set.

    Attributes:
        activity: By site.
        interactions: Of each pair, in the order of layers.
        tokens: Number of tokens.
    """

    activity: dict[Site, Activity]
    interactions: list[Interactions]
    tokens: int


def data_batches(
    model: TracedModel,
    pairs: EncodedTask | None,
    data: Path | None,
    n_tokens: int,
    batch_size: int | None,
    context_length: int | None = None,
) -> list[Tokens]:
    """Prompts to gather over: the task's clean ones, then texts until there are enough tokens.

    Args:
        model: Any traced model.
        pairs: The task, if any.
        data: File of texts; None for the model's own corpus, where it has one.
        n_tokens: At least so many, as far as a file has them.
        batch_size: Prompts per pass; None chooses by length.
        context_length: Most tokens of a text; None: as many as the model reads.

    Raises:
        OptionError: a number is not positive.
        ModelError: there are no prompts at all.
    """
    for name, number in (("n-tokens", n_tokens), ("batch-size", batch_size)):
        if number is not None and number < 1:
            raise OptionError(f"--{name} {number} is too small; give 1 or more")
    rows: list[Tensor] = []
    if pairs is not None:
        clean = pairs.clean
        rows = [clean.ids[row][clean.mask[row]].cpu() for row in distinct_rows(pairs)]
    missing = n_tokens - sum(map(len, rows))
    try:
        stream = PromptStream(model, data, context_length, SEED) if missing > 0 else None
    except ModelError:
        # Without a corpus the task's own prompts are all there is.
        if not rows:
            raise
        stream = None
    number = 0
    while stream is not None and missing > 0 and number != stream.repeats:
        rows.append(stream[number].long())
        missing, number = missing - len(rows[-1]), number + 1
    rows.sort(key=len)
    size = batch_size or max(1, PASS // len(rows[-1]))
    return [pad(rows[i : i + size], model.device) for i in range(0, len(rows), size)]


@torch.no_grad()
def gather(
    model: TracedModel,
    pairs: Sequence[Pair],
    dictionaries: Mapping[Site, Dictionary],
    batches: Sequence[Tokens],
) -> Gathered:
    """Activity and attributions over prompts.

    Args:
        model: Any traced model.
        pairs: In the order of layers.
        dictionaries: By site.
        batches: Prompts.
    """
    sites = sites_of(pairs)
    written = {site: written_site(site, dictionaries[site]) for site in sites}
    activity = {site: Activity(dictionaries[site]) for site in sites}
    found = [Interactions(pair) for pair in pairs]
    routes = [make_route(model, p, dtype=dictionaries[p.source].W_e.dtype) for p in pairs]
    for tokens in track(batches, "attributing latents"):
        run = model.run(tokens, read=[*sites, *written.values()], logits="none")
        for site, target in written.items():
            activity[site].add(dictionaries[site], run[site], tokens, model.vocab_size, run[target])
        for interactions, route in zip(found, routes, strict=True):
            _add(interactions, route, dictionaries, run)
    return Gathered(activity, found, sum(int(tokens.mask.sum()) for tokens in batches))


def _add(
    interactions: Interactions, route: Route, dictionaries: Mapping[Site, Dictionary], run: Run
) -> None:
    """Add the attributions of a batch across a pair of sites."""
    pair, sums = interactions.pair, interactions.sums
    source, target = dictionaries[pair.source], dictionaries[pair.target]
    found = route.attributions(source, target, run[pair.source], mask=run.mask, with_error=True)
    for name, events in events_by_part(found, run.mask.shape[1]).items():
        if name not in sums:
            sums[name] = EdgeSums(source.n, target.n)
        sums[name].add(events)
        sums[name].add_targets(found.target_index, found.z_target)


def events_by_part(found: Attributions, n_positions: int) -> dict[str, Events]:
    """Attributions between active latents, by the parts of :class:`Interactions`.

    Args:
        found: All attributions of a batch.
        n_positions: Of the batch.
    """
    parts = {COMPUTED: _events(found, found.values, None, n_positions)}
    for name, values in ((LOCAL, found.local), (SKIP, found.skip)):
        if values is not None:
            parts[name] = _events(found, values, found.own, n_positions)
    if SKIP in parts:
        parts[TOTAL] = parts[COMPUTED].joined(parts[SKIP])
    return parts


def _events(
    found: Attributions, values: Tensor, columns: Tensor | None, n_positions: int
) -> Events:
    """Attributions as a list of those between active latents, of earlier or the same position.

    Args:
        found: All attributions.
        values: Those to list, ``[n, k_out, m]``.
        columns: Which columns of ``found`` they are, ``[n, m]``; None for all.
        n_positions: Of the batch.
    """
    place = found.token[:, None] % n_positions
    index, z = found.source_index, found.z_source
    offset = torch.zeros_like(index)
    if found.source_position is not None:
        offset = place - found.source_position
    if columns is not None:
        index, z, offset = (part.gather(1, columns) for part in (index, z, offset))
    there = (z != 0) & (offset >= 0)
    row, i, j = (there[:, None, :] & (found.z_target != 0)[:, :, None]).nonzero().unbind(1)
    return Events(
        token=found.token[row],
        target=found.target_index[row, i],
        source=index[row, j],
        value=values[row, i, j],
        z_source=z[row, j],
        offset=offset[row, j],
    )
