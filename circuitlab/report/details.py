"""Details of a circuit's components: what patching each does, both ways, and where heads attend."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab.errors import SiteError
from circuitlab.patcher import Mode, patchers
from circuitlab.sites import Site

if TYPE_CHECKING:
    from circuitlab.evaluation.evidence import Evidence
    from circuitlab.model import TracedModel
    from circuitlab.prompts import EncodedTask

#: Prompts that an attention pattern is the mean of, and tokens of the longest one shown.
N_PROMPTS, MAX_TOKENS = 8, 48
#: Pairs that a component is patched on.
N_PAIRS = 32


def details(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """Of each component of the circuit that is one of the model, plain JSON.

    ``effects``, in the metric's unit, mean over held-out pairs, negative = it helps. ``noise``:
    metric where the component alone writes what it writes on the corrupt prompt, less the clean
    metric. ``denoise``: the corrupt metric, less the metric where in the corrupt run it alone
    writes what it writes on the clean prompt.
    ``pattern``: of a head, ``tokens`` of one prompt and the mean attention ``values`` over prompts
    of that length, ``[query][key]``; not of models whose attention keeps none.
    """
    subject = evidence.subject
    model, wiring = subject.model, subject.model.wiring
    pairs = model.encode(evidence.held_out.task)
    names = [name for name in evidence.circuit.nodes if name in wiring.source_rows]
    found: dict[str, dict[str, Any]] = {name: {"effects": {}} for name in names}
    if names and pairs.aligned:
        some = pairs.rows(slice(N_PAIRS))
        for mode in ("noise", "denoise"):
            for name, effect in zip(names, _effects(model, some, names, mode), strict=True):
                found[name]["effects"][mode] = effect
    chosen = _alike(pairs)
    if chosen is not None:
        with suppress(SiteError):  # fast kinds of attention keep no patterns
            for name, pattern in _patterns(model, chosen, names).items():
                found[name]["pattern"] = pattern
    return {
        name: {key: data for key, data in parts.items() if data} for name, parts in found.items()
    }


def _effects(model: TracedModel, pairs: EncodedTask, names: list[str], mode: Mode) -> list[float]:
    parts: list[Tensor] = []
    for patcher in patchers(model, pairs, mode=mode):
        scores = patcher.sets([patcher.out_edges(name) for name in names])
        change = scores - patcher.base_score
        parts.append((change if mode == "noise" else -change).cpu())
    effects: list[float] = torch.cat(parts, 1).mean(1).tolist()
    return effects


def _alike(pairs: EncodedTask) -> EncodedTask | None:
    """A few pairs whose clean prompts have one length, the commonest; None if all are long."""
    lengths = pairs.clean.mask.sum(1).tolist()
    counts = Counter(length for length in lengths if length <= MAX_TOKENS)
    if not counts:
        return None
    common = max(counts, key=lambda length: (counts[length], -length))
    return pairs.rows([row for row, length in enumerate(lengths) if length == common][:N_PROMPTS])


def _patterns(model: TracedModel, pairs: EncodedTask, names: list[str]) -> dict[str, Any]:
    heads = [(name, model.wiring.component(name)) for name in names]
    heads = [(name, part) for name, part in heads if part.kind == "head"]
    sites = {part.layer: Site("pattern", part.layer) for _, part in heads}
    if not sites:
        return {}
    run = model.run(pairs.clean, read=list(sites.values()), logits="none")
    tokens = list(pairs.tokens_text[0])
    found = {}
    for name, part in heads:
        mean = run[sites[part.layer]][:, part.head].double().mean(0)
        values = [[round(value, 4) for value in row] for row in mean.tolist()]
        found[name] = {"tokens": tokens, "values": values}
    return found
