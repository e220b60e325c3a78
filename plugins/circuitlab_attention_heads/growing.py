"""The analysis ``norm-growth``: norms by layer, what attenuates, what each layer would answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import (
    CircuitGraph,
    TaskError,
    check_cut,
    choose_batch_size,
    distinct_rows,
    mean_intervals,
    track,
)
from circuitlab_attention_heads.attenuation import Attenuation, attenuation, final_shares, readers
from circuitlab_attention_heads.growth import (
    Growth,
    TokenNorms,
    growth_of_tokens,
    growth_of_weights,
    later_tokens,
    sites,
    streams,
    token_norms,
    weight_norms,
)
from circuitlab_attention_heads.growth_report import (
    WRITES,
    add_panels,
    counted,
    findings,
)
from circuitlab_attention_heads.lens import Lens, logit_lens

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, Tokens, TracedModel
    from circuitlab import Task as Asked

SCORE = (
    "share of the final residual stream r: o · r / |r|² of the component's write o at the last "
    "position, mean over clean prompts; negative = against the stream; all shares, that of biases "
    "included, sum to 1"
)
#: Shares this much smaller than the largest are rounding.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Measured:
    """What was read of the clean prompts.

    Attributes:
        norms: Tokens of different prompts, see :class:`.growth.TokenNorms`.
        attenuation: Over the same tokens.
        shares: See :func:`.attenuation.final_shares`, ``[n_sources + 1, n_pairs]``.
        lens: Of all pairs.
        weights: See :func:`.growth.weight_norms`.
        growth: Of ``stream``, ``attention`` and ``mlp`` by tokens, and of the weights that are not
            all 0.
    """

    norms: TokenNorms
    attenuation: Attenuation
    shares: Tensor
    lens: Lens
    weights: dict[str, Tensor]
    growth: dict[str, Growth]


def norm_growth(
    model: TracedModel,
    task: Asked,
    *,
    top: int | Literal["all"] = 40,
    threshold: float | None = None,
    batch_size: int | None = None,
) -> CircuitGraph:
    """How the residual stream, what is written to it and the weights grow from layer to layer.

    Norms are of vectors as norms see them (less their mean where the model has LayerNorms), at
    every token of different clean prompts but the first, which often is an attention sink. Weights
    have their norm folded in.

    Args:
        model: Any traced model.
        task: The task; only its clean prompts are run.
        top: How many components to keep, by the absolute score.
        threshold: Keep components of at least this absolute score; with ``top`` both hold.
        batch_size: Pairs per batch; None chooses by memory.

    Returns:
        Direct edges to ``logits``: ``score`` is the signed share of the final stream at the last
        position, ``interval`` its 95 % interval over pairs. Nodes have ``write_norm``, the
        geometric mean of what they write; ``size`` and ``projection``, by later reader: mean
        ``|o| / |r|`` and ``o · r / |r|²`` over tokens; heads ``ov_norm``, ``o_norm``, ``q_norm``
        and ``k_norm``. ``graph["growth"]`` has norms by layer, their ``bounds`` and ``rate``;
        ``graph["lens"]`` the logit lens by layer; ``graph["bias_share"]`` the biases' share.

    Raises:
        OptionError: ``top`` or ``threshold`` is negative.
        TaskError: no prompt has a second token.
        NumericsError: an activation is not finite, or a final stream is 0.
    """
    check_cut(top, threshold)
    pairs = model.encode(task)
    seed = torch.initial_seed()
    found = _measure(model, pairs, choose_batch_size(model, pairs, batch_size), seed)
    circuit = _circuit(model, pairs, found, top, threshold, seed)
    n_tokens = found.norms.prompt.numel()
    n_prompts = len(set(found.norms.prompt[0].tolist()))
    circuit.graph |= {
        "score": SCORE,
        "method": (
            f"norms by layer at {counted(n_tokens, 'token')} of "
            f"{counted(n_prompts, 'clean prompt')}, the first of each left out; logit lens"
        ),
        "growth": _growth_data(found),
        "lens": _lens_data(found.lens, distinct_rows(pairs), seed),
        "bias_share": float(found.shares[-1].mean()),
    }
    circuit.graph["findings"] = findings(model, found, circuit.graph["lens"])
    add_panels(circuit, model, found)
    return circuit


# --- measuring ------------------------------------------------------------------------------------


def _measure(model: TracedModel, pairs: EncodedTask, size: int, seed: int) -> Measured:
    """One pass over the clean prompts, and one of the last norm for each layer."""
    centred, different = model.weights.centres, _different(pairs.clean)
    read = {*sites(model), *model.source_sites}
    norms, attenuations, shares, lenses = [], [], [], []
    start = 0
    for batch in track(list(pairs.batches(size)), "reading norms by layer"):
        run = model.run(batch.clean, read=read)
        outputs, stream = model.source_outputs(run), streams(model, run, centred=centred)
        rows = torch.arange(start, start + len(batch))
        start += len(batch)
        where = later_tokens(run) & different[rows].to(run.mask.device)[:, None]
        where &= (stream != 0).any(-1).all(0)
        norms.append(token_norms(model, run, stream, where, rows, centred=centred))
        attenuations.append(
            attenuation(model, outputs[:, where], stream[:, where], centred=centred)
        )
        last = (outputs[:, :, -1], stream[-1, :, -1])
        shares.append(final_shares(model, batch, *last, centred=centred))
        lenses.append(logit_lens(model, batch, run))
    tokens, weights = TokenNorms.joined(norms), weight_norms(model)
    if not tokens.prompt.numel():
        raise TaskError(
            f"task {pairs.task.name!r}: no clean prompt has a second token with a residual stream "
            f"that is not 0; the first of each is left out, as it often is an attention sink: give "
            f"longer prompts"
        )
    growth = {
        name: growth_of_tokens(getattr(tokens, name), tokens.prompt[0], seed)
        for name in ("stream", "attention", "mlp")
    }
    if model.n_layers == 1:
        growth["stream"] = replace(growth["stream"], rate=None)
    growth |= {name: growth_of_weights(each) for name, each in weights.items() if each.any()}
    joined = Attenuation.joined(attenuations)
    return Measured(tokens, joined, torch.cat(shares, 1), Lens.joined(lenses), weights, growth)


def _different(prompts: Tokens) -> Tensor:
    """Where a prompt repeats no earlier one, ``[n_prompts]`` bool."""
    seen: dict[tuple[int, ...], int] = {}
    for row, (ids, mask) in enumerate(zip(prompts.ids, prompts.mask, strict=True)):
        seen.setdefault(tuple(ids[mask].tolist()), row)
    different = torch.zeros(len(prompts), dtype=torch.bool)
    different[list(seen.values())] = True
    return different


# --- the circuit ----------------------------------------------------------------------------------


def _circuit(
    model: TracedModel,
    pairs: EncodedTask,
    found: Measured,
    top: int | Literal["all"],
    threshold: float | None,
    seed: int,
) -> CircuitGraph:
    """Components of the largest shares, with their edges to the logits."""
    sources = model.wiring.sources
    scores = found.shares.mean(1).tolist()[: len(sources)]
    bounds = mean_intervals(found.shares[:, distinct_rows(pairs)], seed)
    written = found.attenuation.write_norms()
    size, projection = found.attenuation.size(), found.attenuation.projection()
    circuit = CircuitGraph()
    kept = _strongest(scores, sources, top, threshold)
    for row in sorted(kept):
        kind, layer, head = model.wiring.component(sources[row])
        data: dict[str, Any] = {} if head is None else {"head": head}
        if head is not None:
            norms = found.weights.items()
            data |= {f"{name}_norm": float(of[layer, head]) for name, of in norms if name != "out"}
        if written[row] is not None:
            data["write_norm"] = written[row]
        data |= {"size": _by_reader(size[row]), "projection": _by_reader(projection[row])}
        circuit.add_component(sources[row], kind=kind, layer=layer, **data)
    circuit.add_component("logits", kind="logits", layer=model.n_layers)
    for row in kept:
        interval = bounds[row]
        told: dict[str, Any] = {} if interval is None else {"interval": list(interval)}
        circuit.add_effect(sources[row], "logits", scores[row], **told)
    return circuit


def _strongest(
    scores: Sequence[float],
    names: Sequence[str],
    top: int | Literal["all"],
    threshold: float | None,
) -> list[int]:
    """Rows to keep, by absolute score, ties by name; with ``top`` no rounding errors."""
    order = sorted(range(len(scores)), key=lambda row: (-abs(scores[row]), names[row]))
    if threshold is not None:
        order = [row for row in order if abs(scores[row]) >= threshold]
    if top == "all" or not order:
        return order
    least = NEGLIGIBLE * abs(scores[order[0]])
    return [row for row in order if abs(scores[row]) > least][:top]


def _by_reader(values: Tensor) -> dict[str, float]:
    """What is known of ``[n_layers + 1]``, without a layer 0 that reads the input alone."""
    named = zip(readers(len(values) - 1), values.tolist(), strict=True)
    return {name: value for name, value in list(named)[1:] if value == value}


def _growth_data(found: Measured) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, growth in found.growth.items():
        data[name] = {"means": growth.means}
        if any(growth.bounds):
            data[name]["bounds"] = [None if b is None else list(b) for b in growth.bounds]
        if (rate := growth.rate) is not None:
            interval = None if rate.interval is None else list(rate.interval)
            said = {"factor": rate.factor, "interval": interval, "fit": rate.fit}
            data[name]["rate"] = {key: value for key, value in said.items() if value is not None}
    for name in WRITES:
        data[name]["cosines"] = found.norms.cosines(name)
    return data


def _lens_data(lens: Lens, distinct: Sequence[int], seed: int) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, values in (("kl", lens.kl), ("metric", lens.metric), ("accuracy", lens.right)):
        data[name] = {"mean": values.mean(1).tolist()}
        bounds = mean_intervals(values[:, list(distinct)], seed)
        ends = [bound for bound in bounds if bound is not None]
        if ends:
            data[name] |= {"lo": [low for low, _ in ends], "hi": [high for _, high in ends]}
    return data
