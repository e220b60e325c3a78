"""Ablations: edges between latents held against exact runs of the model.

Attributions are gradients: they see no latent enter or leave the selection of a TopK or JumpReLU
dictionary. Here latents are taken out of the activation, and the model is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from circuitlab import choose_batch_size, rank_correlation, ratio_interval, track
from circuitlab_feature_interactions.sites import sites_of, written_site

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Dictionary, EncodedTask, Interval, Site, Tokens, TracedModel
    from circuitlab_feature_interactions.edges import EdgeTable
    from circuitlab_feature_interactions.sites import Pair

#: Strongest edges that hold this share of the mass are not at the bottom.
MIDDLE = 0.95

#: Some latents of a site; the number after the last one is the error.
Latents = tuple[int, ...]
#: Source latents that a target latent may be made of, by target latent.
Kept = Mapping[int, frozenset[int]]


# --- edges one by one -----------------------------------------------------------------------------


def sample_edges(sizes: Tensor, n: int, seed: int = 0) -> dict[str, list[int]]:
    """Edges to verify: a third the strongest, a third of the middle, the rest of the bottom.

    The middle, with the strongest, holds :data:`MIDDLE` of the sum of sizes. Where a stratum has
    fewer edges, the strongest that are left make up for it.

    Args:
        sizes: Size of each edge, ``[m]``.
        n: How many to take; all where there are no more.
        seed: Of the draws.

    Returns:
        Numbers of edges by stratum: ``strongest``, ``middle``, ``bottom``.
    """
    order = sizes.argsort(descending=True, stable=True).tolist()
    whole = float(sizes.sum())
    falling = sizes[order].cumsum(0)
    middle_end = int((falling < MIDDLE * whole).sum()) + 1 if whole > 0 else 0
    generator = torch.Generator().manual_seed(seed)

    def drawn(pool: list[int], most: int) -> list[int]:
        chosen = torch.randperm(len(pool), generator=generator)[: max(0, most)].tolist()
        return sorted(pool[place] for place in chosen)

    strongest = order[: -(-n // 3)]
    middle = drawn(order[len(strongest) : middle_end], n // 3)
    bottom = drawn(order[max(middle_end, len(strongest)) :], n - len(strongest) - n // 3)
    taken = {*strongest, *middle, *bottom}
    spare = [edge for edge in order if edge not in taken][: max(0, n - len(taken))]
    return {"strongest": strongest + spare, "middle": middle, "bottom": bottom}


@torch.no_grad()
def exact_effects(
    model: TracedModel,
    batches: Sequence[Tokens],
    pair: Pair,
    dictionaries: Mapping[Site, Dictionary],
    edges: EdgeTable,
    scale: Tensor,
) -> Tensor:
    """What each source latent adds to its target latent, by taking it out; like ``edges.mean``.

    The source latent is taken out at every position of the prompt, all else, the error too, is
    kept, and the model runs on. Where the number of the latent is that of the error, the
    reconstruction is put in the activation's place. A transcoder's latents and error are in what it
    writes.

    Args:
        model: Any traced model.
        batches: Prompts.
        pair: The sites.
        dictionaries: By site.
        edges: Those to measure, ``[m]``.
        scale: Mean of each target latent where active, ``[n_target]``.

    Returns:
        ``[m]``, float64: mean of (target latent − the same without the source) over the tokens at
        which both are active, over ``scale``; a target that drops out of the selection is 0 then.
        NaN where there is no such token.
    """
    ends = [((j,), (i,)) for j, i in zip(edges.source.tolist(), edges.target.tolist(), strict=True)]
    return group_effects(model, batches, pair, dictionaries, ends, scale)


@torch.no_grad()
def group_effects(
    model: TracedModel,
    batches: Sequence[Tokens],
    pair: Pair,
    dictionaries: Mapping[Site, Dictionary],
    edges: Sequence[tuple[Latents, Latents]],
    scale: Tensor,
) -> Tensor:
    """The same of source latents that are taken out together, on the sum of target latents.

    Args:
        model: Any traced model.
        batches: Prompts.
        pair: The sites.
        dictionaries: By site.
        edges: Source latents and target latents of each, ``m``.
        scale: Mean of each target latent where active, ``[n_target]``.

    Returns:
        ``[m]``, float64: mean, over the tokens at which a source and a target latent are active,
        of Σ (target latent − the same without the sources) / ``scale`` over all target latents;
        those that come in instead of others count too. NaN where there is no such token.
    """
    reads, writes = dictionaries[pair.source], dictionaries[pair.target]
    out, scale = written_site(pair.source, reads), scale.to(model.device)
    total = torch.zeros(len(edges), dtype=torch.float64)
    count = torch.zeros(len(edges), dtype=torch.float64)
    rows: dict[Latents, list[int]] = {}
    for row, (sources, _) in enumerate(edges):
        rows.setdefault(sources, []).append(row)
    for tokens in track(batches, "ablating latents"):
        run = model.run(tokens, read=[pair.source, out, pair.target], logits="none")
        before, z = writes.encode(run[pair.target]), reads.encode(run[pair.source])
        error = reads.error(run[pair.source], run[out])
        for sources, chosen in rows.items():
            active, written = _written(reads, error, z, sources)
            active = active & tokens.mask
            some = active.any(1).nonzero()[:, 0]
            if not len(some):
                continue
            changed = {out: (run[out] - written)[some]}
            after = writes.encode(_run_to(model, tokens.rows(some), pair.target, changed))
            seen = ((active if pair.route == "mlp" else active.cumsum(1) > 0) & tokens.mask)[some]
            for row in chosen:
                targets = list(edges[row][1])
                old, new = before[some][..., targets], after[..., targets]
                where = seen & (old != 0).any(-1)
                total[row] += ((old - new).double() / scale[targets])[where].sum().cpu()
                count[row] += where.sum().cpu()
    return total / count


def _written(
    reads: Dictionary, error: Tensor, z: Tensor, sources: Latents
) -> tuple[Tensor, Tensor]:
    """Where any is active, ``[batch, pos]``, and what they write, ``[batch, pos, width]``."""
    latents = [source for source in sources if source != reads.n]
    active, written = (z[..., latents] != 0).any(-1), z[..., latents] @ reads.W_d[latents]
    return (active, written) if len(latents) == len(sources) else (active | True, written + error)


def _run_to(model: TracedModel, tokens: Tokens, site: Site, write: Mapping[Site, Tensor]) -> Tensor:
    return model.run(tokens, write=write, read=[site], logits="none")[site]


@dataclass(frozen=True)
class Agreement:
    """How well attributions say what ablations do.

    Attributes:
        n: Edges compared.
        sign: Share with the same sign; an edge that does nothing has no sign and agrees with none.
        rank: Spearman's correlation; None where one of the two is the same for all.
        slope: Exact effect per attribution, least squares through 0; None where all are 0.
    """

    n: int
    sign: float
    rank: float | None
    slope: float | None

    def text(self) -> str:
        """One line."""
        words = [f"sign right for {self.sign:.0%} of {self.n} edges"]
        words += [] if self.rank is None else [f"rank correlation {self.rank:.2f}"]
        words += [] if self.slope is None else [f"effect per attribution {self.slope:.2f}"]
        return ", ".join(words)


def agreement(attributions: Tensor, exact: Tensor) -> Agreement | None:
    """Compare ``[m]`` with ``[m]``; edges that were not measured are left out; None where all."""
    known = exact.isfinite()
    a, b = attributions[known].double(), exact[known].double()
    if not len(a):
        return None
    sign = float(((a.sign() == b.sign()) & (a != 0)).double().mean())
    below = float(a @ a)
    return Agreement(
        len(a),
        sign,
        rank_correlation(a.tolist(), b.tolist()),
        float(a @ b) / below if below > 0 else None,
    )


# --- the kept edges alone -------------------------------------------------------------------------


@dataclass(frozen=True)
class Recovery:
    """What a model does with all, with the kept and with no edges; ``[n_prompts]``, float64.

    Attributes:
        clean: Of each prompt, with the model as it is.
        kept: With the kept edges alone.
        none: With no edge.
        weights: What sums are divided by: predicted tokens, or 1 for a prompt.
        higher: Whether higher is better.
    """

    clean: Tensor
    kept: Tensor
    none: Tensor
    weights: Tensor
    higher: bool

    def mean(self, name: str) -> tuple[float, Interval | None]:
        """Mean of ``clean``, ``kept`` or ``none``, with its 95 % interval over prompts."""
        sums = getattr(self, name)
        return float(sums.sum() / self.weights.sum()), ratio_interval(sums, self.weights)

    def recovered(self) -> tuple[float, Interval | None] | None:
        """Share of what no edges lose that the kept ones bring back, with its 95 % interval.

        1: they do all of it; None where the model does no better with all edges than with none.
        """
        sign = 1 if self.higher else -1
        above, below = sign * (self.kept - self.none), sign * (self.clean - self.none)
        if float(below.sum()) <= 0:
            return None
        return float(above.sum() / below.sum()), ratio_interval(above, below)


@dataclass(frozen=True)
class KeptEdges:
    """The model with latents that see only those latents from which a kept edge comes.

    Each target latent is computed by the model itself, from a reconstruction that has no other
    source latents: ``z'_i = e_i(F(b_d + Σ_kept z_j d_j + error))``, at all positions. A target
    without kept edges sees none. The target site then holds ``z'`` decoded, and its own error from
    the clean run; pairs follow one another in the order of layers. Errors stay at both ends, so
    that with all edges the model is what it was.

    A transcoder's latents are decoded to what its MLP writes, and the stream goes on beside it.
    Between transcoders, ``z'`` of one pair is what the next pair's targets are made of.

    Attributes:
        model: Any traced model.
        pairs: In the order of layers.
        dictionaries: By site.
        kept: Source latents of target latents, for each pair.
    """

    model: TracedModel
    pairs: Sequence[Pair]
    dictionaries: Mapping[Site, Dictionary]
    kept: Sequence[Kept]

    @torch.no_grad()
    def loss(self, batches: Sequence[Tokens]) -> Recovery:
        """Sum of the next-token loss over each prompt, in nats, at every position."""
        found = [
            [_losses(self.model, tokens, written) for written in self._written(tokens)]
            for tokens in track(batches, "running kept edges")
        ]
        predicted = [(t.mask[:, 1:] & t.mask[:, :-1]).sum(1).double().cpu() for t in batches]
        clean, kept, none = (torch.cat(column) for column in zip(*found, strict=True))
        return Recovery(clean, kept, none, torch.cat(predicted), higher=False)

    @torch.no_grad()
    def metric(self, pairs: EncodedTask, batch_size: int | None = None) -> Recovery:
        """The task's metric on its clean prompts."""
        size, found = choose_batch_size(self.model, pairs, batch_size), []
        for batch in track([*pairs.batches(size)], "running kept edges"):
            logits = [
                self.model.run(batch.clean, write=written).logits[:, -1]
                for written in self._written(batch.clean)
            ]
            found.append([batch.score(one, logits[0]).double().cpu() for one in logits])
        clean, kept, none = (torch.cat(column) for column in zip(*found, strict=True))
        return Recovery(clean, kept, none, torch.ones_like(clean), higher=True)

    def _written(self, tokens: Tokens) -> Iterator[dict[Site, Tensor]]:
        """What is written with all edges, with the kept ones, and with none."""
        nothing: list[Kept] = [{} for _ in self.pairs]
        yield {}
        for kept in (self.kept, nothing):
            yield _writes(self.model, tokens, self.pairs, self.dictionaries, kept)


def _writes(
    model: TracedModel,
    tokens: Tokens,
    pairs: Sequence[Pair],
    dictionaries: Mapping[Site, Dictionary],
    kept: Sequence[Kept],
) -> dict[Site, Tensor]:
    outs = {site: written_site(site, dictionaries[site]) for site in sites_of(pairs)}
    clean = model.run(tokens, read=[*outs, *outs.values()], logits="none")
    written: dict[Site, Tensor] = {}
    made: dict[Site, tuple[Tensor, Tensor]] = {}
    for pair, chosen in zip(pairs, kept, strict=True):
        site, out = pair.target, outs[pair.target]
        target = dictionaries[site]
        z = masked_targets(model, tokens, pair, dictionaries, chosen, written, made)
        _, rest = _split(target, clean[site], clean[out])
        written[out] = z @ target.W_d + rest
        if target.transcoder:
            made[site] = z, rest
    return written


def _split(dictionary: Dictionary, x: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Latents ``[batch, pos, n]``, and what is written without them: biases and error."""
    z = dictionary.encode(x)
    return z, written.to(z.dtype) - z @ dictionary.W_d


@torch.no_grad()
def masked_targets(
    model: TracedModel,
    tokens: Tokens,
    pair: Pair,
    dictionaries: Mapping[Site, Dictionary],
    kept: Kept,
    written: Mapping[Site, Tensor],
    made: Mapping[Site, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Target latents ``[batch, pos, n_target]``, each from the source latents kept for it.

    Targets that are made of the same source latents share a run.

    Args:
        model: Any traced model.
        tokens: Prompts.
        pair: The sites.
        dictionaries: By site.
        kept: Source latents of target latents.
        written: What is written at sites before.
        made: Latents of transcoders that are targets of a pair before, and what they leave of the
            MLP's output; others have those of the run.
    """
    reads, writes = dictionaries[pair.source], dictionaries[pair.target]
    out = written_site(pair.source, reads)
    if made and pair.source in made:
        z, rest = made[pair.source]
    else:
        run = model.run(tokens, write=written, read=[pair.source, out], logits="none")
        z, rest = _split(reads, run[pair.source], run[out])
    groups: dict[frozenset[int], list[int]] = {}
    for target in range(writes.n):
        groups.setdefault(kept.get(target, frozenset()), []).append(target)
    found = z.new_zeros(*z.shape[:2], writes.n)
    for sources, targets in groups.items():
        some = sorted(sources)
        part = torch.zeros_like(z)
        part[..., some] = z[..., some]
        changed = {**written, out: part @ reads.W_d + rest}
        after = writes.encode(_run_to(model, tokens, pair.target, changed))
        found[..., targets] = after[..., targets]
    return found


def _losses(model: TracedModel, tokens: Tokens, written: Mapping[Site, Tensor]) -> Tensor:
    """Sum of the next-token loss over each prompt, ``[batch]``, float64."""
    logits = model.run(tokens, write=written, logits="all").logits[:, :-1].double()
    losses = functional.cross_entropy(logits.transpose(1, 2), tokens.ids[:, 1:], reduction="none")
    return (losses * (tokens.mask[:, 1:] & tokens.mask[:, :-1])).sum(1).cpu()
