"""Token ablation: which tokens of the prompts the behaviour depends on, alone and together.

Each token is an arrow to what is measured; a set of tokens that interact is a gate between them:
OR where either suffices, so that no token alone seems to matter, AND where all are needed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import CircuitGraph, Heatmap, OptionError
from circuitlab_path_patching.features import Feature, read_feature
from circuitlab_path_patching.gates.types import FLAT
from circuitlab_path_patching.panels import add_panels
from circuitlab_path_patching.tokens.effects import How, TokenEffects, token_effects
from circuitlab_path_patching.tokens.estimates import estimates
from circuitlab_path_patching.tokens.gates import TokenGate, add_gates, effect_scale, find_gates

if TYPE_CHECKING:
    from circuitlab import EncodedTask, Task, TracedModel

#: Prompts of the heat map, interactions that are listed, those in a finding, texts of a token.
ROWS, LISTED, SHOWN, EXAMPLES = 16, 20, 3, 5


def token_ablation(
    model: TracedModel,
    task: Task,
    *,
    how: How = "replace",
    order: int = 2,
    top: int = 8,
    replacement: str | None = None,
    draws: int = 4,
    feature: str | Feature | None = None,
    direction: Path | None = None,
    batch_size: int | Literal["auto"] = "auto",
) -> CircuitGraph:
    """The circuit of a task's tokens: what the metric, or a feature, loses without them.

    Nodes are ``t0``, ``t1``, … by position in the clean prompts; where these differ in length,
    ``t-1``, ``t-2``, … by position from the end. Scores are means over the pairs whose token could
    be ablated; those below a hundredth of the largest have ``kept`` False and are not drawn. A
    gate's score is that of ablating all its members; each member brings in its Shapley share of it.

    Args:
        model: Any traced model.
        task: What to explain.
        how: ``remove`` a token, so that later ones move forward and the second word becomes the
            first; ``replace`` it; or ``knock-out`` the attention to it, all else as it was.
        order: Size of the largest sets of tokens that are ablated together: 1 to 4.
        top: Sets of three and four are made of this many strongest tokens.
        replacement: Text of the one token that replaces each token, or ``#ID``. None: the corrupt
            prompt's token where that differs, else draws from the task's prompts.
        draws: Draws to average over.
        feature: A site, as ``resid_post.1[-1]``, whose dot product with ``direction`` is measured
            in place of the metric; in Python also any :class:`Feature`.
        direction: Safetensors file of one vector.
        batch_size: Prompts per pass.

    Raises:
        OptionError: an option does not fit.
        TaskError: no token can be ablated, or the task cannot be used.
        NumericsError: the metric or the feature is not finite.
    """
    if direction is not None and not isinstance(feature, str):
        raise OptionError("--direction is of a site; name that with --feature, or leave it out")
    if replacement is not None and how != "replace":
        raise OptionError(f"--replacement is nothing to {how} by; use it with --how replace")
    pairs = model.encode(task)
    if isinstance(feature, str):
        feature = read_feature(feature, direction, model, pairs)
    effects = token_effects(
        model,
        pairs,
        how=how,
        order=order,
        top=top,
        replacement=None if replacement is None else _token_id(replacement, model),
        draws=draws,
        feature=feature,
        batch_size=None if batch_size == "auto" else batch_size,
        seed=torch.initial_seed(),
    )
    circuit = _circuit(effects, pairs, feature, model.n_layers, torch.initial_seed())
    circuit.graph["method"] = f"token ablation, sets of up to {order}"
    by = f"token {replacement}" if replacement else f"corrupt token, else {draws} draws"
    circuit.graph["ablation"] = f"replace by {by}" if how == "replace" else how
    return circuit


def _circuit(
    effects: TokenEffects, pairs: EncodedTask, feature: Feature | None, n_layers: int, seed: int
) -> CircuitGraph:
    circuit = CircuitGraph()
    names = _names(effects, pairs)
    scores = estimates(effects.scores, effects, pairs, seed)
    sets = [subset for subset in effects.scores if len(subset) > 1]
    dividends = estimates({s: effects.dividend(s) for s in sets}, effects, pairs, seed)
    if feature is None:
        target = circuit.add_component("logits", kind="logits", layer=n_layers)
    else:
        layer = max((site.layer or 0 for site in feature.sites), default=0)
        target = circuit.add_component(feature.name, kind="feature", layer=layer)
    least = FLAT * effect_scale(effects)
    for position in effects.positions:
        name, score = names[position], scores[(position,)]
        place = int(name.removeprefix("t"))
        token = _token(effects, pairs, position)
        n_pairs = int(effects.has((position,)).sum())
        circuit.add_component(name, kind="token", layer=0, position=place, **token)
        facts: dict[str, Any] = {"kind": "total", "interval": score.bounds, "n_pairs": n_pairs}
        kept = abs(score.mean) >= least
        circuit.add_effect(name, target, score.mean, kept=kept, **facts)
    gates = find_gates(effects, pairs, scores, dividends, seed)
    add_gates(circuit, gates, effects, names, target, seed)
    circuit.graph["interactions"] = [
        {"tokens": [names[p] for p in subset], "dividend": found.mean, "interval": found.bounds}
        for subset, found in sorted(dividends.items(), key=lambda item: -abs(item[1].mean))
    ][:LISTED]
    what = "metric" if feature is None else feature.name
    _heatmap(effects, pairs, names, what).add_to(circuit)
    add_panels(circuit, pairs.metric.name if feature is None else feature.name)
    circuit.graph["findings"] = _findings(effects, pairs, circuit, gates, names)
    circuit.graph["warnings"] = _warnings(effects, pairs, names)
    circuit.graph["score"] = (
        f"{what}(tokens ablated) - {what}(clean), mean over pairs; negative = the tokens "
        f"{'help the task' if feature is None else 'raise it'}; into a gate: shares of its score"
    )
    return circuit


def _names(effects: TokenEffects, pairs: EncodedTask) -> dict[int, str]:
    """Name of each position up to the one that is read.

    From the start where that means the same in every pair, else from the end.
    """
    lengths = pairs.clean.mask.sum(-1)
    shift = int(lengths[0]) if bool((lengths == lengths[0]).all()) else 0
    first = -int(lengths.max())
    return {position: f"t{position + shift}" for position in range(first, effects.read_at + 1)}


def _token(effects: TokenEffects, pairs: EncodedTask, position: int) -> dict[str, Any]:
    """The commonest text at a position, and the commonest few where pairs differ."""
    rows = effects.has((position,)).nonzero()[:, 0].tolist()
    texts = Counter(pairs.tokens_text[row][position] for row in rows)
    common = [text for text, _ in texts.most_common(EXAMPLES)]
    return {"token": common[0], **({"tokens": common} if len(common) > 1 else {})}


def _heatmap(
    effects: TokenEffects, pairs: EncodedTask, names: dict[int, str], what: str
) -> Heatmap:
    """Effect of each token in each of the first pairs, and its text; None where there is none."""
    rows, columns, values, texts = range(min(len(pairs), ROWS)), [], [], []
    for position in effects.positions:
        token = _token(effects, pairs, position)
        name = names[position]
        columns.append(name if "tokens" in token else f"{name} {token['token']}")
        able = effects.able[:, position].tolist()
        scores = effects.scores[(position,)].tolist()
        values.append([scores[row] if able[row] else None for row in rows])
        texts.append([pairs.tokens_text[row][position] if able[row] else "" for row in rows])
    return Heatmap(
        title="Which tokens matter, pair by pair",
        caption="White is no effect.",
        rows=[f"pair {pairs.numbers[row]}" for row in rows],
        columns=columns,
        values=list(zip(*values, strict=True)),
        notes=list(zip(*texts, strict=True)),
        what=f"{what}(without the token) - {what}(clean)",
        column_label="token",
    )


def _findings(
    effects: TokenEffects,
    pairs: EncodedTask,
    circuit: CircuitGraph,
    gates: list[TokenGate],
    names: dict[int, str],
) -> dict[str, str]:
    means = {position: effects.mean((position,)) for position in effects.positions}
    shown, least = [], FLAT * effect_scale(effects)
    for position in sorted(means, key=lambda p: -abs(means[p]))[:SHOWN]:
        data = circuit.nodes[names[position]]
        text = "" if "tokens" in data else f' "{data["token"]}"'
        if abs(means[position]) >= least:
            shown.append(f"{names[position]}{text} {means[position]:.3g}")
    lines = {"tokens": ", ".join(shown) or "none matters alone"}
    if gates:
        more = f"; {len(gates) - SHOWN} more" if len(gates) > SHOWN else ""
        lines["interactions"] = "; ".join(gate.sentence(names) for gate in gates[:SHOWN]) + more
    elif len(effects.scores) > len(effects.positions):
        lines["interactions"] = "none that is strong and sure"
    real = pairs.clean.mask.any(0)
    if missing := [name for p, name in names.items() if p not in means and real[p]]:
        fact = "it is read there, so the token can only be replaced"
        if effects.how == "replace":
            fact = "there is no other token to replace it by"
        lines["left out"] = f"{', '.join(missing)}: {fact}"
    return lines


def _warnings(effects: TokenEffects, pairs: EncodedTask, names: dict[int, str]) -> list[str]:
    """What a reader of the means must know."""
    found = []
    if names[effects.positions[0]].startswith("t-"):
        found.append(
            "prompts differ in length: tokens are counted from the end, t-1 is the last one"
        )
    means = torch.tensor([abs(effects.mean((p,))) for p in effects.positions])
    if len(pairs) > 1 and means.any():
        leader = int(means.argmax())
        singles = torch.stack([effects.scores[(p,)].abs() for p in effects.positions])
        share = float((singles[leader] >= singles.amax(0)).double().mean())
        if share < 0.5:
            found.append(
                f"tokens play other parts in other prompts: {names[effects.positions[leader]]}, "
                f"the strongest on average, is the strongest in {share:.0%} of them; look at the "
                f"heat map, or give prompts of one pattern"
            )
    return found


def _token_id(text: str, model: TracedModel) -> int:
    """The id of the one token that is meant."""
    tokenizer = model.tokenizer
    number = text.removeprefix("#") if text.startswith("#") or tokenizer is None else ""
    if number.isdecimal():
        if int(number) < model.vocab_size:
            return int(number)
        fact = f"is no token: ids run from 0 to {model.vocab_size - 1}"
    elif tokenizer is None:
        fact = "is text, but the model has no tokenizer"
    else:
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
        fact = f"is {len(ids)} tokens, not one" if len(ids) != 1 else "is not in the vocabulary"
    raise OptionError(f"--replacement {text!r} {fact}; give one token's text, or #ID")
