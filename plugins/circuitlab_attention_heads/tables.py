"""Tables of one head's circuits as plots, and what the norms divide them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import Curve, Curves, Heatmap, TextTable
from circuitlab_attention_heads.head_names import Head, head_name
from circuitlab_attention_heads.qk import QKCircuit, rotation

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, TracedModel
    from circuitlab_attention_heads.reading import Found
    from circuitlab_attention_heads.shares import Shares

#: Rows of the table of outputs, and tokens of a cell.
ROWS, IN_CELL = 16, 5
#: A part of the scores with smaller shares is not shown.
LEAST = 0.005
#: Offsets of the curve of scores.
OFFSETS = 32


@dataclass(frozen=True)
class Scales:
    """What tables are multiplied by: 1/σ of the norms.

    Attributes:
        queries: Of each token as a query, ``[n_tokens]``.
        keys: As a key; the earlier head's norm divides it too.
        values: As a value.
        position_queries: Of each position as a query, ``[n_positions]``.
        position_keys: As a key.
        final: Of the final norm.
        said: What they are, in words.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    position_queries: Tensor
    position_keys: Tensor
    final: float
    said: str


@torch.no_grad()
def scales_of(
    model: TracedModel,
    head: Head,
    through: Head | None,
    tokens: Tensor,
    positions: Tensor,
    shares: Shares | None,
) -> Scales:
    """What the norms divide a head's tables by.

    In layer 0 the stream is the embedding: σ is that of each token, and with learned positions the
    mean of 1/σ over the positions, as for positions it is over the tokens. Later it is the mean of
    1/σ over the task's prompts; without a task nothing is divided. Nor is anything divided by norms
    behind queries, keys or the attention, or capped.
    """
    final = 1.0 if shares is None else shares.scales[None]
    learned = model.weights.positions(torch.float64)
    if head[0] == 0:
        stream = model.weights.embedding(model.dtype)[tokens].double()[:, None]
        if learned is not None:
            stream = stream + learned[positions]
        inverse = 1 / model.weights.norm_scale(0, stream)[..., 0]
        each, at = inverse.mean(1), inverse.mean(0).expand(len(positions))
        said = "Norm: divided by each token's own scale"
        said += "." if learned is None else ", mean over positions."
        said += _left_out(model)
        return Scales(each, each, each, at, at, final, said)
    own = 1.0 if shares is None else shares.scales[head[0]]
    earlier = 1.0 if shares is None or through is None else shares.scales[through[0]]
    ones, at = (torch.ones(len(x), dtype=torch.float64).to(x.device) for x in (tokens, positions))
    said = "Norms: divided by their mean scale on the task's prompts."
    if shares is None:
        said = "Before the norms divide: without a task their scale is not known."
    said += _left_out(model)
    keys = own * earlier
    return Scales(own * ones, keys * ones, own * ones, own * at, keys * at, final, said)


def _left_out(model: TracedModel) -> str:
    """What comes after the tables, in words."""
    a = model.architecture
    norms = [
        *(["queries and keys"] if a.q_norm or a.k_norm else []),
        *(["what attention writes"] if a.attention_post_norm else []),
    ]
    caps = [*(["scores"] if a.score_softcap else []), *(["logits"] if a.logit_softcap else [])]
    said = f" Before the norm of {' and of '.join(norms)}." if norms else ""
    return said + (f" Before the cap of {' and of '.join(caps)}." if caps else "")


def add_panels(
    circuit: CircuitGraph, model: TracedModel, found: Found, details: dict[str, Any]
) -> None:
    """Put the plots of a head's circuits beside its circuit."""
    for offset, qk in zip(found.offsets, found.qk, strict=True):
        _tokens(found, qk, offset).add_to(circuit)
    if (positions := _positions(found)) is not None:
        positions.add_to(circuit)
    elif found.qk[0].turn is not None:
        _offsets(model, found).add_to(circuit)
    if found.shares is not None and found.shares.scores is not None:
        _shares(found.name, found.shares.parts, found.shares.scores).add_to(circuit)
    _outputs(found).add_to(circuit)
    _output_table(found.name, details).add_to(circuit)
    if details["directions"]:
        _direction_table(found.name, details["directions"]).add_to(circuit)


def _title(found: Found, what: str) -> str:
    through = "" if found.through is None else f" through {head_name(found.through)}"
    return f"QK circuit of {found.name}{through}: {what}"


def _key(found: Found) -> str:
    """What the columns of a QK table are."""
    if found.through is None:
        return "key"
    return f"key: what {head_name(found.through)} wrote of it"


def _tokens(found: Found, qk: QKCircuit, offset: int) -> Heatmap:
    blocks, scales = qk.blocks(found.tokens, found.positions), found.scales
    table = blocks["token", "token"] * scales.queries[:, None] * scales.keys
    names = list(found.texts)
    bias = blocks["bias", "token"] * scales.keys
    if bool(bias.any()):
        table, names = torch.cat([bias, table]), ["any: b_Q", *names]
    at = "" if qk.turn is None else f", offset {offset}"
    return Heatmap(
        title=_title(found, f"tokens{at}"),
        rows=names,
        columns=found.texts,
        values=table.tolist(),
        what="attention score from tokens, before the softmax",
        row_label="query",
        column_label=_key(found),
        caption=found.scales.said,
    )


def _positions(found: Found) -> Heatmap | None:
    """None without learned positions, and where none of them tells from another."""
    blocks, scales = found.qk[0].blocks(found.tokens, found.positions), found.scales
    block = blocks.get(("position", "position"))
    if block is None or not bool(block.any()):
        return None
    table = block * scales.position_queries[:, None] * scales.position_keys
    names = [str(position) for position in found.positions.tolist()]
    return Heatmap(
        title=_title(found, "positions"),
        rows=names,
        columns=names,
        values=[
            [value if key <= query else None for key, value in enumerate(row)]
            for query, row in enumerate(table.tolist())
        ],
        what="attention score from positions, before the softmax",
        row_label="query",
        column_label=_key(found),
        caption=found.scales.said,
    )


def _offsets(model: TracedModel, found: Found) -> Curves:
    """Scores by the distance of query and key: what positions are to rotary embeddings."""
    offsets, scales = range(min(OFFSETS, model.n_positions)), found.scales
    same, other, bias = [], [], []
    itself = torch.eye(len(found.tokens), dtype=torch.bool, device=found.tokens.device)
    for offset in offsets:
        blocks = replace(found.qk[0], turn=rotation(model, found.head[0], offset)).blocks(
            found.tokens, found.positions
        )
        table = blocks["token", "token"] * scales.queries[:, None] * scales.keys
        same.append(float(table[itself].mean()))
        other.append(float(table[~itself].mean()) if len(table) > 1 else None)
        terms = (
            (blocks["bias", "token"] * scales.keys).mean(),
            (blocks["token", "bias"] * scales.queries[:, None]).mean(),
            blocks["bias", "bias"][0, 0],
        )
        bias.append(float(sum(terms)))
    curves = [Curve(name="same token", mean=same)]
    if len(found.tokens) > 1:
        curves.append(Curve(name="other tokens", mean=other))
    if any(bias):
        curves.append(Curve(name="biases", mean=bias))
    return Curves(
        title=_title(found, "offsets"),
        x=list(offsets),
        x_label="positions from the key to the query",
        y_label="mean attention score, before the softmax",
        curves=curves,
        caption=found.scales.said,
    )


def _shares(name: str, parts: Sequence[str], shares: Tensor) -> Heatmap:
    some = shares.abs() >= LEAST
    rows, columns = (some.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    values = shares[rows][:, columns].tolist()
    return Heatmap(
        title=f"What decides where {name} looks",
        rows=[parts[row] for row in rows],
        columns=[parts[column] for column in columns],
        values=values,
        what="share of the variation of scores over keys; all add up to 1",
        row_label="query",
        column_label="key",
        notes=[[f"{round(value, 2) + 0.0:.2f}" for value in row] for row in values],
        caption=(
            "On the task's clean prompts. What is the same for all keys cancels. Parts below "
            f"{LEAST:.1%} are left out."
        ),
    )


def _outputs(found: Found) -> Heatmap:
    return Heatmap(
        title=f"OV circuit of {found.name}",
        rows=found.texts,
        columns=found.texts,
        values=found.outputs[:, found.tokens].tolist(),
        what="logit, less the mean over the vocabulary",
        row_label="the token that it looks at",
        column_label="logit of",
        caption=found.scales.said,
    )


def _output_table(name: str, details: dict[str, Any]) -> TextTable:
    rows = [
        [row["token"], _listed(row["largest"]), _listed(row["smallest"])]
        for row in details["outputs"][:ROWS]
    ]
    if "constant" in details:
        ends = details["constant"]
        rows.append(["always: b_V", _listed(ends["largest"]), _listed(ends["smallest"])])
    return TextTable(
        title=f"What {name} writes",
        header=["looks at", "raises most", "lowers most"],
        rows=rows,
    )


def _direction_table(name: str, directions: Sequence[dict[str, Any]]) -> TextTable:
    rows: list[list[str | float]] = []
    for number, direction in enumerate(directions, 1):
        for sign, end in (("+", "largest"), ("−", "smallest")):
            rows.append(
                [
                    f"{number} {sign}",
                    direction["value"],
                    f"{direction['share']:.0%}",
                    _listed(direction["reads"][end]),
                    _listed(direction["writes"][end]),
                ]
            )
    return TextTable(
        title=f"Singular directions of {name}",
        header=["", "value", "of norm²", "reads", "writes"],
        rows=rows,
        caption="What is read at an end of a direction is written at the same end.",
    )


def _listed(ends: Sequence[Sequence[Any]]) -> str:
    """The first few tokens of an end; quoted, so that spaces show."""
    return " ".join(text if text[:1] == "#" else f"“{text}”" for text, _ in ends[:IN_CELL])
