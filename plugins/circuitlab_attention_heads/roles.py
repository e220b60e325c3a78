"""Roles: what each head attends to on random tokens of which a segment comes twice.

The roles are those of Olsson et al. 2022 (arXiv:2209.11895), Wang et al. 2022 (arXiv:2211.00593)
and McDougall et al. 2023 (arXiv:2310.04625). A head that attends to punctuation has none here: what
it looks for does not occur in random tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import Heatmap, NumericsError, OptionError, Site, mean_intervals, track
from circuitlab_attention_heads.sequences import (
    LEAST_DISTANCES,
    LEAST_SEQUENCES,
    Repeats,
    find_lengths,
    find_vocabulary,
    repeated_sequences,
)
from circuitlab_attention_heads.suppression import find_predictions, measure

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import TracedModel

PREVIOUS, CURRENT, FIRST = "previous-token", "current-token", "first-token"
DUPLICATE, INDUCTION = "duplicate-token", "induction"
#: What is measured for :data:`SUPPRESSION`: attention to the token that is predicted.
PREDICTED = "predicted-token"
SUPPRESSION = "copy-suppression"

#: Offsets of those roles that are one.
_FIXED = {CURRENT: 0, PREVIOUS: 1}
#: Names short enough for a cell.
_SHORT = {
    PREVIOUS: "prev", CURRENT: "self", FIRST: "first", DUPLICATE: "dup", INDUCTION: "ind",
    SUPPRESSION: "supp",
}  # fmt: skip
#: Positions after the first that are its control.
_EARLY = 3
#: Heads that a line of findings names.
_SHOWN = 4
#: Bytes that the activations of one pass may take.
_MEMORY = 256 * 2**20

Head = tuple[int, int]


@dataclass(frozen=True)
class RoleTable:
    """The roles of all heads of a model.

    Attributes:
        shape: Layers and heads per layer.
        nodes: Node data of each (layer, head), see :meth:`of`; empty where nothing was measured.
        facts: How it was measured, as plain JSON; ``not_measured`` says why it was not.
    """

    shape: tuple[int, int]
    nodes: Mapping[Head, dict[str, Any]]
    facts: Mapping[str, Any]

    def of(self, layer: int, head: int) -> dict[str, Any]:
        """Node data of a head, plain JSON; empty where nothing was measured.

        * ``role``: Its strongest role, or ``copy-suppression`` where it has that; absent if none.
        * ``roles``: All of them, that one first; absent if none.
        * ``role_scores``: By name, ``score``: mean attention, 0 to 1; ``lo``, ``hi``: its 95 %
          bootstrap interval over sequences; ``control``. ``predicted-token`` also has
          ``direct_effect``: ``score``, ``lo`` and ``hi`` in logits; below 0 it lowers the token.
        * ``n_eff``: Effective number of keys, exp(entropy of the attention), mean over queries.
        """
        return deepcopy(self.nodes.get((layer, head), {}))

    def panels(self) -> list[Heatmap]:
        """A heat map of the heads, layers downwards; none where nothing was measured."""
        if not self.nodes:
            return []
        n_layers, n_heads = self.shape
        cells = [[_cell(self.nodes[layer, h]) for h in range(n_heads)] for layer in range(n_layers)]
        return [
            Heatmap(
                title="roles of heads",
                caption=(
                    f"Named where attention is {self.facts['threshold']:g} or more and above its "
                    f"control; else the largest attention of all roles."
                ),
                rows=[str(layer) for layer in range(n_layers)],
                columns=[str(head) for head in range(n_heads)],
                values=[[score for score, _ in row] for row in cells],
                what="attention to the role's key, 0 to 1",
                row_label="layer",
                column_label="head",
                diverging=False,
                notes=[[note for _, note in row] for row in cells],
            )
        ]

    def findings(self, heads: Collection[Head] | None = None) -> dict[str, str]:
        """One line for each role that a head has, strongest heads first.

        Args:
            heads: Only these (layer, head); None is all.
        """
        if why := self.facts.get("not_measured"):
            return {"roles": f"not measured: {why}"}
        kept = {head: data for head, data in self.nodes.items() if heads is None or head in heads}
        by_role: dict[str, list[tuple[float, str]]] = {}
        for (layer, head), data in kept.items():
            for role in data.get("roles", ()):
                score = data["role_scores"][PREDICTED if role == SUPPRESSION else role]
                line = f"a{layer}.h{head} {_said(score, effect=role == SUPPRESSION)}"
                by_role.setdefault(role, []).append((-score["score"], line))
        if not by_role:
            least = self.facts["threshold"]
            return {"roles": f"none: no role has attention of {least:g} or more, above its control"}
        order = [name for name in (*self.facts["roles"], SUPPRESSION) if name in by_role]
        return {name: _listed([line for _, line in sorted(by_role[name])]) for name in order}


def find_roles(
    model: TracedModel,
    *,
    threshold: float = 0.4,
    seed: int = 0,
    batch_size: int | None = None,
    n_sequences: int = 64,
    max_offset: int = 4,
) -> RoleTable:
    """Find what each head attends to, on random tokens of which a segment comes twice.

    All scores are of the same queries, those of the second copy, and no two roles of this list
    share a key there: scores are shares of the same attention. With ``t`` the query's position and
    ``s`` that of the earlier occurrence of its token, further back than any offset that is a role:

    =================== ======== =================================================================
    role                key      control: mean attention of the same query to
    =================== ======== =================================================================
    ``previous-token``  t - 1    t and t - 2
    ``current-token``   t        t - 1
    ``first-token``     0        1 to 3
    ``offset-k``        t - k    t - k + 1 and t - k - 1, k from 2 to ``max_offset``
    ``duplicate-token`` s        where s is in other sequences, as offsets
    ``induction``       s + 1    where s + 1 is in other sequences, as offsets
    =================== ======== =================================================================

    The last two controls give a head that attends by position alone just what its score is, on
    average: all offsets are equally frequent, and independent of where the query stands. For
    ``copy-suppression`` see :func:`circuitlab_attention_heads.suppression.measure`.

    A head has a role where its score is at least ``threshold`` and the 95 % interval of score less
    control, over sequences, is above 0; for ``copy-suppression`` the interval of the direct effect
    is also below 0.

    Args:
        model: Any traced model.
        threshold: Attention that a role needs.
        seed: Of sequences and intervals.
        batch_size: Sequences per pass; None chooses by memory.
        n_sequences: How many sequences.
        max_offset: Largest offset that is a role; fewer where the model reads too few tokens.

    Returns:
        The table; empty, with the reason, where the model's context or vocabulary is too small for
        such sequences.

    Raises:
        OptionError: an option is out of its range.
        NumericsError: the model's residual stream is not finite.
    """
    if not 0 < threshold <= 1:
        raise OptionError(
            f"threshold {threshold:g} of a role is no share of attention; give one above 0, up to 1"
        )
    if max_offset < 1:
        raise OptionError(f"largest offset {max_offset} is too small; use 1 or more")
    shape = (model.n_layers, model.n_heads)
    vocabulary = find_vocabulary(model)
    lengths = find_lengths(model, vocabulary, max_offset)
    if lengths is None:
        why = (
            f"prompts of {model.n_positions} tokens from {len(vocabulary.words)} words hold no "
            f"segment twice at {LEAST_DISTANCES} distances or more"
        )
        return RoleTable(shape, {}, {"not_measured": why})
    repeats = repeated_sequences(model, vocabulary, lengths, n=n_sequences, seed=seed)
    roles = role_names(repeats, max_offset)
    facts = {
        "roles": roles,
        "threshold": threshold,
        "n_sequences": n_sequences,
        "longest": repeats.tokens.ids.shape[1],
        "distances": list(lengths.distance),
        "begins_with_bos": vocabulary.bos is not None,
        "seed": seed,
    }
    nodes: dict[Head, dict[str, Any]] = {}
    measured = _measured(model, repeats, roles, _batches(model, repeats, batch_size))
    for layer, parts in enumerate(measured):
        heads = summarise(parts, [*roles, PREDICTED], threshold, seed)
        nodes |= {(layer, head): data for head, data in enumerate(heads)}
    return RoleTable(shape, nodes, facts)


def role_names(repeats: Repeats, max_offset: int) -> list[str]:
    """The roles that are told apart on these sequences."""
    furthest = min(max_offset, repeats.distances[0] - 2)
    return [PREVIOUS, CURRENT, FIRST, DUPLICATE, INDUCTION] + [
        f"offset-{k}" for k in range(2, furthest + 1)
    ]


def key_weights(repeats: Repeats, role: str) -> Tensor:
    """How much each (query, key) counts in a role's score, and in its control.

    Returns:
        Score and control, ``[2, n, query, key]``, float64; of each sequence they add up to 1.
    """
    offsets, places = repeats.offsets, repeats.tokens.position_ids[:, None, :]
    if role in (DUPLICATE, INDUCTION):
        step = int(role == INDUCTION)
        least, most = repeats.distances
        target = offsets == (repeats.distance - step)[:, None, None]
        control = (offsets >= least - step) & (offsets <= most - step) & ~target
    elif role == FIRST:
        target, control = places == 0, (places > 0) & (places <= _EARLY)
    else:
        offset = _FIXED[role] if role in _FIXED else int(role.removeprefix("offset-"))
        target, control = offsets == offset, (offsets >= 0) & ((offsets - offset).abs() == 1)
    asked = repeats.queries[:, :, None] & repeats.tokens.mask[:, None, :]
    keys = torch.stack([target & asked, control & asked]).double()
    return keys / keys.sum((-2, -1), keepdim=True)


def attention(pattern: Tensor, weights: Tensor) -> Tensor:
    """Attention of each head to weighted keys.

    Args:
        pattern: ``[n, n_heads, query, key]``.
        weights: ``[..., n, query, key]``.

    Returns:
        ``[..., n, n_heads]``.
    """
    return torch.einsum("...bqk,bhqk->...bh", weights.to(pattern.dtype), pattern)


def _measured(
    model: TracedModel, repeats: Repeats, roles: list[str], batches: list[slice]
) -> list[dict[str, Tensor]]:
    """Of each layer what :func:`summarise` takes; the predicted token comes after the roles."""
    reader, predictions = find_predictions(model, repeats, batches)
    layers, last = range(model.n_layers), Site("resid_post", model.n_layers - 1)
    sites = [*(Site(kind, layer) for layer in layers for kind in ("pattern", "z")), last]
    found: list[list[dict[str, Tensor]]] = [[] for _ in layers]
    for rows in track(batches, "measuring roles"):
        part = repeats.rows(rows)
        weights = torch.stack([key_weights(part, role) for role in roles], 1)
        share = part.queries.double() / part.queries.sum(-1, keepdim=True)
        run = model.run(part.tokens, read=sites, logits="none")
        if not run[last][part.queries].isfinite().all():
            raise NumericsError(
                f"the residual stream of model {model.name!r} is not finite on random tokens; "
                f"check the weights, or run in a wider type (--dtype float32)"
            )
        for layer in layers:
            said = measure(model, run, repeats, reader, predictions, rows, layer)
            pattern = run[Site("pattern", layer)].to(said.mass.dtype)
            scores, controls = attention(pattern, weights)
            keys = torch.special.entr(pattern).sum(-1).exp()
            n_eff = torch.einsum("bq,bhq->bh", share.to(keys.dtype), keys)
            one = {
                "scores": torch.cat([scores, said.mass[None]]),
                "controls": torch.cat([controls, said.control[None]]),
                "effect": said.effect[None],
                "n_eff": n_eff[None],
            }
            found[layer].append({name: value.cpu() for name, value in one.items()})
    return [{name: torch.cat([one[name] for one in by], 1) for name in by[0]} for by in found]


def summarise(
    parts: Mapping[str, Tensor], names: Sequence[str], threshold: float, seed: int
) -> list[dict[str, Any]]:
    """Node data of the heads of a layer, see :meth:`RoleTable.of`.

    Args:
        parts: ``scores`` and ``controls``, ``[n_names, n, n_heads]``, NaN for sequences in which
            nothing was measured; a score of few other sequences is left out. ``effect`` of the
            predicted token and ``n_eff``, ``[1, n, n_heads]``.
        names: Of the scores.
        threshold: Attention that a role needs.
        seed: Of the intervals.
    """
    heads: list[dict[str, Any]] = [
        {"role_scores": {}, "n_eff": n_eff} for n_eff in parts["n_eff"][0].mean(0).tolist()
    ]
    passed: list[dict[str, float]] = [{} for _ in heads]
    for name, scores, controls in zip(names, parts["scores"], parts["controls"], strict=True):
        kept = scores.isfinite().all(-1)
        if int(kept.sum()) < LEAST_SEQUENCES:
            continue
        own, above = _estimates(scores[kept], seed), _estimates((scores - controls)[kept], seed)
        effects = _estimates(parts["effect"][0, kept], seed) if name == PREDICTED else None
        for number, control in enumerate(controls[kept].mean(0).tolist()):
            entry = {**own[number], "control": control}
            passes = entry["score"] >= threshold and above[number]["lo"] > 0
            role = name
            if effects is not None:
                entry["direct_effect"] = effects[number]
                passes, role = passes and effects[number]["hi"] < 0, SUPPRESSION
            heads[number]["role_scores"][name] = entry
            if passes:
                passed[number][role] = entry["score"]
    for data, scores_of in zip(heads, passed, strict=True):
        # It says of attention that may also be another role what comes of it.
        order = sorted(scores_of, key=lambda role: (role != SUPPRESSION, -scores_of[role]))
        if order:
            data |= {"role": order[0], "roles": order}
    return heads


def _estimates(values: Tensor, seed: int) -> list[dict[str, float]]:
    """Mean over sequences, and its interval, of each column of ``[n, n_heads]``."""
    rows = values.double().T
    bounds = mean_intervals(rows, seed)
    return [
        {"score": mean, "lo": bound[0], "hi": bound[1]}
        for mean, bound in zip(rows.mean(1).tolist(), bounds, strict=True)
        if bound is not None
    ]


def _batches(model: TracedModel, repeats: Repeats, asked: int | None) -> list[slice]:
    """Rows of each pass, so many that its activations fit in :data:`_MEMORY`."""
    if asked is not None and asked < 1:
        raise OptionError(f"batch size {asked} is too small; use 1 or more, or auto")
    n, width = repeats.queries.shape
    per_layer = width * (width * model.n_heads + 2 * model.d_model)
    size = asked or max(1, _MEMORY // (4 * model.n_layers * per_layer))
    return [slice(start, start + size) for start in range(0, n, size)]


def _cell(data: Mapping[str, Any]) -> tuple[float, str]:
    """Score and note of a head in the heat map."""
    scores, role = data["role_scores"], data.get("role")
    if role is None:
        return max(score["score"] for score in scores.values()), ""
    score = scores[PREDICTED if role == SUPPRESSION else role]["score"]
    return score, _SHORT.get(role, role.replace("offset-", "t-"))


def _said(score: Mapping[str, Any], *, effect: bool) -> str:
    text = "{score:.2f} [{lo:.2f}, {hi:.2f}], control {control:.2f}".format(**score)
    if not effect:
        return text
    logits = "{score:+.2f} [{lo:+.2f}, {hi:+.2f}]".format(**score["direct_effect"])
    return f"{text}, direct effect {logits} logits"


def _listed(lines: Sequence[str]) -> str:
    more = len(lines) - _SHOWN
    return "; ".join([*lines[:_SHOWN], *[f"{more} more"] * (more > 0)])
