"""The analysis ``head-circuits``: what one head looks for and what it writes, from its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import CircuitGraph, GraphError, OptionError, choose_batch_size, distinct_rows
from circuitlab_attention_heads.directions import (
    Readings,
    SingularDirections,
    both_ends,
    read_directions,
    singular_directions,
)
from circuitlab_attention_heads.ends import Effect, end_compositions
from circuitlab_attention_heads.head_names import Head, head_name
from circuitlab_attention_heads.ov import OVCircuit, centred_unembedding, ov_circuit
from circuitlab_attention_heads.qk import QKCircuit, qk_circuit
from circuitlab_attention_heads.shares import Shares, input_shares
from circuitlab_attention_heads.tables import LEAST, Scales, add_panels, scales_of
from circuitlab_attention_heads.vocabulary import token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, Task, Tokens, TracedModel

#: Tokens of a table, those of a task and those that are named; positions of a table.
TASK_TOKENS, MOST_TOKENS, MOST_POSITIONS = 24, 64, 32
#: Blocks of scores that a line of the result names.
SHOWN = 4

SCORE = (
    "composition of weights × chance: norm of the product / product of the norms, × √d; 1 = as "
    "unrelated weights have; no sign"
)


@dataclass(frozen=True)
class Found:
    """All that is read of one head.

    Attributes:
        head: Layer and number.
        through: The earlier head whose output is the keys' side, if any.
        tokens: Ids of the tables' tokens, ``[n]``.
        texts: Their texts.
        positions: Of the tables, ``[n]``.
        offsets: Of rotary embeddings; a 0 without them.
        qk: The QK circuit of each offset.
        ov: The OV circuit.
        directions: The singular directions of W_OV, and as tokens.
        compositions: Those of the head's ends, × chance.
        shares: What the parts of the input do on the task's prompts; None without a task.
        scales: What tables are divided by.
    """

    head: Head
    through: Head | None
    tokens: Tensor
    texts: list[str]
    positions: Tensor
    offsets: list[int]
    qk: list[QKCircuit]
    ov: OVCircuit
    directions: tuple[SingularDirections, Readings]
    compositions: dict[Effect, float]
    shares: Shares | None
    scales: Scales

    @property
    def name(self) -> str:
        """``a1.h0``."""
        return head_name(self.head)

    @cached_property
    def outputs(self) -> Tensor:
        """What the head adds to the logits when it looks at a token alone, ``[n, vocab]``."""
        values = self.scales.values[:, None].to(self.ov.written)
        return self.ov.logits(self.tokens) * values * self.scales.final

    @cached_property
    def constant(self) -> Tensor:
        """What b_V adds to the logits, ``[vocab]``."""
        return self.ov.constant() * self.scales.final


def head_circuits(
    model: TracedModel,
    task: Task | None = None,
    *,
    head: str | None = None,
    tokens: str | None = None,
    through: str | None = None,
    svd: int = 4,
    top_tokens: int = 8,
    offsets: str | None = None,
) -> CircuitGraph:
    """Read the QK and the OV circuit of one head, in tokens, positions and singular directions.

    Args:
        model: Any traced model.
        task: Its clean prompts give tokens, the sizes that norms divide by, and shares; without
            one, tables of heads behind layer 0 are those before the norms divide.
        head: As ``a1.h0``.
        tokens: Texts of single tokens or ``#ID``, separated by commas; a space belongs to the
            token. If left out, those of the clean prompts, at most :data:`TASK_TOKENS`.
        through: An earlier head: the QK circuit is then that of a query's token and what this head
            wrote of a token (Olsson et al. 2022, arXiv:2209.11895).
        svd: Singular directions of W_OV; 0 for none.
        top_tokens: Tokens at each end of an output or a direction.
        offsets: Rotary models: positions from the key to the query, separated by commas; 1 if left
            out.

    Returns:
        ``input``, the head, the head ``through``, and ``logits``, with edges between them whose
        ``score`` is their composition × chance, see
        :func:`circuitlab_attention_heads.ends.end_compositions`, and with a task their ``share``:
        q and k, of the variation of the scores over keys; v, of what the head writes; logits, of
        the last token's logits. See :class:`circuitlab_attention_heads.shares.Shares`. The head has
        ``matching`` and ``best_keys`` (those that are the query's own token, and tokens that have a
        best key). ``graph["head_circuit"]`` has the outputs, the constant write of b_V, the
        directions, and all shares. In ``graph["score"]`` it is said what a score is.

    Raises:
        OptionError: no head is named, or a head, token or offset does not exist.
        ModelError: a norm cannot be folded, or the model attends otherwise than by the softmax of
            its queries times its keys.
    """
    if svd < 0 or top_tokens < 1:
        raise OptionError(
            f"--svd {svd} --top-tokens {top_tokens}: nothing can be shown; give 0 or more "
            f"directions, and 1 token or more"
        )
    chosen, earlier = _head(model, "--head", head), None
    if through is not None:
        earlier = _head(model, "--through", through)
    pairs = None if task is None else model.encode(task)
    found = _read(
        model, pairs, chosen, earlier, _tokens(model, pairs, tokens), _offsets(model, offsets), svd
    )
    circuit = CircuitGraph(score=SCORE, method=_method(found, pairs))
    _add_edges(circuit, model, found)
    data = circuit.nodes[found.name]
    own, deciding = found.qk[0].best_keys(found.tokens)
    data |= {"best_keys": [own, deciding]}
    if (matching := found.qk[0].matching()) is not None:
        data["matching"] = matching
    circuit.graph["findings"] = _findings(model, found, data)
    circuit.graph["head_circuit"] = _details(model, found, top_tokens)
    add_panels(circuit, model, found, circuit.graph["head_circuit"])
    return circuit


def _read(
    model: TracedModel,
    pairs: EncodedTask | None,
    head: Head,
    through: Head | None,
    ids: Sequence[int],
    offsets: list[int],
    svd: int,
) -> Found:
    qk = [qk_circuit(model, head, through=through, offset=offset) for offset in offsets]
    unembedding = centred_unembedding(model)
    ov = ov_circuit(model, head, unembedding)
    batches = _prompts(model, pairs, ids)
    # Without a task too: it is here that the model is found to be as it is described.
    shares = input_shares(model, batches, head, ov.written, through=through)
    told = None if pairs is None else shares
    longest = max(int(batch.position_ids.max()) + 1 for batch in batches)
    positions = torch.arange(min(longest, MOST_POSITIONS), device=model.device)
    tokens = torch.tensor(ids, device=model.device)
    directions = singular_directions(model, head, svd)
    return Found(
        head,
        through,
        tokens,
        model.token_texts(ids),
        positions,
        offsets,
        qk,
        ov,
        (directions, read_directions(model, directions, unembedding)),
        end_compositions(model, head, unembedding, through=through, offset=offsets[0]),
        told,
        scales_of(model, head, through, tokens, positions, told),
    )


def _head(model: TracedModel, flag: str, text: str | None) -> Head:
    last = head_name((model.n_layers - 1, model.n_heads - 1))
    if text is None:
        raise OptionError(f"{flag} is missing: this is about one head; name one of a0.h0 … {last}")
    try:
        kind, layer, number = model.wiring.component(text.strip())
    except GraphError:
        kind, layer, number = "", 0, None
    if kind != "head" or number is None:
        raise OptionError(f"{flag} {text!r} is no head of this model; give one of a0.h0 … {last}")
    return layer, number


def _offsets(model: TracedModel, text: str | None) -> list[int]:
    rotary = bool(model.architecture.rotary)
    if text is None:
        return [min(1, model.n_positions - 1)] if rotary else [0]
    if not rotary:
        raise OptionError(
            f"--offsets {text}: this model has no rotary embeddings, so that its token scores "
            f"depend on no offset; leave it out"
        )
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() and len(piece) < 10 for piece in pieces):
        raise OptionError(f"--offsets {text!r} is no list of whole numbers; write it as 0,1,8")
    return list(dict.fromkeys(int(piece) for piece in pieces))


def _tokens(model: TracedModel, pairs: EncodedTask | None, text: str | None) -> list[int]:
    if text is not None:
        ids = token_ids(model, text)
        if len(ids) > MOST_TOKENS:
            raise OptionError(
                f"--tokens names {len(ids)} tokens, a table shows {MOST_TOKENS}; name fewer"
            )
        return ids
    if pairs is None:
        raise OptionError(
            "--tokens is missing, and there is no task to take tokens from; name some, as "
            "'cat,dog' or '#17', or give a task"
        )
    rows = zip(pairs.clean.ids.tolist(), pairs.clean.mask.tolist(), strict=True)
    seen = [i for ids, real in rows for i, is_real in zip(ids, real, strict=True) if is_real]
    return list(dict.fromkeys(seen))[:TASK_TOKENS]


def _prompts(model: TracedModel, pairs: EncodedTask | None, ids: Sequence[int]) -> list[Tokens]:
    """The distinct clean prompts; without a task the tokens themselves, as one prompt."""
    if pairs is None:
        return [model.tokens([tuple(ids[: model.n_positions])])]
    pairs = pairs.rows(distinct_rows(pairs))
    return [batch.clean for batch in pairs.batches(choose_batch_size(model, pairs))]


def _method(found: Found, pairs: EncodedTask | None) -> str:
    text = f"weights of {found.name}, norms folded in"
    if found.through is not None:
        text += f", keys through {head_name(found.through)}"
    return text if pairs is None else f"{text}; shares on {len(distinct_rows(pairs))} clean prompts"


def _add_edges(circuit: CircuitGraph, model: TracedModel, found: Found) -> None:
    for name in ("input", *[head_name(h) for h in (found.through, found.head) if h], "logits"):
        kind, layer, number = model.wiring.component(name)
        data = {} if number is None else {"head": number}
        circuit.add_component(name, kind=kind, layer=layer, **data)
    for (source, target, port), score in found.compositions.items():
        share = _share(found, source, port)
        measured = {} if share is None else {"share": share}
        circuit.add_effect(source, target, score, port=port, **measured)


def _share(found: Found, source: str, port: str) -> float | None:
    """The share of a source in what it goes into, where it was measured."""
    if found.shares is None:
        return None
    if not port:
        return found.shares.logits
    values = {
        "q": None if found.shares.scores is None else found.shares.scores.sum(1),
        "k": None if found.shares.scores is None else found.shares.scores.sum(0),
        "v": found.shares.values,
    }[port]
    parts = ("token", "position") if source == "input" else (source,)
    rows = [row for row, part in enumerate(found.shares.parts) if part in parts]
    return None if values is None else float(values[rows].sum())


def _details(model: TracedModel, found: Found, n: int) -> dict[str, Any]:
    """What was read, as plain JSON: tokens at both ends, each with its number."""
    details: dict[str, Any] = {"tokens": found.texts, "outputs": []}
    for text, row in zip(found.texts, found.outputs, strict=True):
        details["outputs"].append({"token": text, **_ends(model, row, n)})
    constant = found.constant
    if bool(constant.any()):
        details["constant"] = _ends(model, constant, n)
    directions, readings = found.directions
    details["directions"] = [
        {
            "value": float(directions.values[row]),
            "share": float(directions.shares[row]),
            "reads": _ends(model, readings.inputs[row], n),
            "writes": _ends(model, readings.outputs[row], n),
        }
        for row in range(len(directions.values))
    ]
    if found.shares is not None:
        details["parts"] = list(found.shares.parts)
        for name in ("scores", "values"):
            if (share := getattr(found.shares, name)) is not None:
                details[f"{name}_shares"] = share.tolist()
    return details


def _ends(model: TracedModel, values: Tensor, n: int) -> dict[str, list[list[Any]]]:
    """The largest and the smallest of ``[vocab]``: text and value of each token."""
    large, small = both_ends(values, n)
    return {
        name: [
            [text, float(values[token])]
            for text, token in zip(model.token_texts(ids), ids, strict=True)
        ]
        for name, ids in (("largest", large), ("smallest", small))
    }


def _findings(model: TracedModel, found: Found, data: dict[str, Any]) -> dict[str, str]:
    """What the numbers say, one line each."""
    own, deciding = data["best_keys"]
    behind = "" if found.through is None else f" through {head_name(found.through)}"
    at = f" at offset {found.offsets[0]}" if model.architecture.rotary else ""
    lines = {}
    if deciding:
        matching = f"{data['matching']:+.2f}" if "matching" in data else "none"
        lines[f"QK{behind}"] = (
            f"same-token matching {matching}, of -1 to 1{at}; the token itself is the best key of "
            f"{own} of {deciding} tokens"
        )
    else:
        lines[f"QK{behind}"] = "no token scores higher with one token than with another"
    if found.shares is not None and found.shares.scores is not None:
        lines["scores"] = _said(found.shares.parts, found.shares.scores)
    elif found.shares is not None:
        lines["scores"] = "the same for all keys on the task's prompts"
    lines["OV"] = _copied(found)
    directions, readings = found.directions
    if len(directions.values):
        lines["directions"] = (
            f"{len(directions.values)} hold {float(directions.shares.sum()):.0%} of the squared "
            f"norm of W_OV; masked for their size: {readings.masked[0]} of the embeddings, "
            f"{readings.masked[1]} of the unembeddings"
        )
        if directions.arbitrary():
            lines["directions"] += "; equal values among them: single directions are arbitrary"
    return lines


def _copied(found: Found) -> str:
    """How often a token that is looked at raises or lowers its own logit the most."""
    rows = torch.arange(len(found.tokens), device=found.tokens.device)
    some = found.outputs.any(1)
    outputs, own = found.outputs[some], found.outputs[rows, found.tokens][some]
    if not len(outputs):
        return "it writes nothing to the logits directly"
    return (
        f"of {len(outputs)} tokens {int((outputs.max(1).values <= own).sum())} raise their own "
        f"logit most, {int((outputs.min(1).values >= own).sum())} lower it most"
    )


def _said(parts: Sequence[str], shares: Tensor) -> str:
    """The largest blocks of scores, in words."""
    blocks = [
        (float(shares[q, k]), f"{query} × {key}")
        for q, query in enumerate(parts)
        for k, key in enumerate(parts)
    ]
    blocks.sort(key=lambda block: (-abs(block[0]), block[1]))
    named = ", ".join(
        f"{name} {share:.0%}" for share, name in blocks[:SHOWN] if abs(share) >= LEAST
    )
    return f"variation over keys, query × key: {named}"
