"""Path patching from senders to receivers, after Wang et al. 2022 (arXiv:2211.00593).

A sender writes its other output. What it changes runs to the receivers past all heads, which stay
as in the base run: through the residual stream alone, or through MLPs too. Then the receivers read
that in an otherwise untouched base run, and everything after them is recomputed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from circuitlab import Edge, GraphError, OptionError, Site, track
from circuitlab_path_patching.paths.effects import check_senders
from circuitlab_path_patching.paths.language import PORTS
from circuitlab_path_patching.paths.trees import edge_set

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Mode, Patcher, Wiring
    from circuitlab_path_patching.effects import Setting

Receiver = tuple[str, str]
Mediate = Literal["heads", "all"]
_Block = tuple[str, int]


def sender_effects(
    setting: Setting,
    senders: Sequence[str],
    receivers: Sequence[Receiver],
    *,
    mediate: Mediate = "heads",
) -> dict[Mode, Tensor]:
    """Exact effect of each sender by way of all receivers together, per pair.

    Receivers keep what they read, whatever other receivers before them change.

    Args:
        setting: What is measured; the ablation is what a sender writes.
        senders: Components that write.
        receivers: ``(component, port)``; the port is ``""`` for MLPs and for ``logits``.
        mediate: ``heads``: heads between sender and receivers stay as they are, MLPs and norms are
            recomputed. ``all``: MLPs stay too, only the direct edges are left.

    Returns:
        For each mode ``[n_senders, n_pairs]``, float64; negative helps; 0 for senders that run
        before no receiver. In mode ``noise`` metric(patched) - metric(clean), in mode ``denoise``
        metric(corrupt) - metric(patched).

    Raises:
        GraphError: a sender or receiver does not exist in the model.
        OptionError: no sender runs before a receiver; ``logits`` stands beside other receivers; or
            mode ``denoise`` with another ablation than ``counterfactual``.
        NumericsError: an activation is not finite.
    """
    _check(setting.model.wiring, senders, receivers)
    if len({component == "logits" for component, _ in receivers}) > 1:
        raise OptionError(
            "receivers: what logits reads is all that the metric sees, so together with logits "
            "the other receivers do nothing; measure logits by itself"
        )
    return {
        mode: _effects(setting, mode, senders, [receivers], mediate)[0] for mode in setting.modes
    }


@dataclass(frozen=True)
class SenderEffects:
    """What senders do by way of receivers.

    Attributes:
        senders: The senders.
        edges: Sender, receiver and port; only those where the sender runs before the receiver.
        effects: For each mode ``[n_edges, n_pairs]``, each by way of this receiver alone.
        together: For each mode ``[n_senders, n_pairs]``, by way of all receivers but ``logits`` at
            once; empty where there are fewer than two of these.
        method: What was measured.
    """

    senders: tuple[str, ...]
    edges: tuple[Edge, ...]
    effects: Mapping[Mode, Tensor]
    together: Mapping[Mode, Tensor]
    method: str


def measure_senders(
    setting: Setting,
    senders: Sequence[str],
    receivers: Sequence[Receiver],
    *,
    mediate: Mediate = "heads",
) -> SenderEffects:
    """:func:`sender_effects` by way of each receiver alone, and of all heads and MLPs among them.

    Raises:
        GraphError: a sender or receiver does not exist in the model.
        OptionError: no sender runs before a receiver, or the ablation does not go with the mode.
    """
    wiring = setting.model.wiring
    _check(wiring, senders, receivers)
    groups: list[Sequence[Receiver]] = [[receiver] for receiver in receivers]
    inner = [receiver for receiver in receivers if receiver[0] != "logits"]
    if len(inner) > 1:
        groups.append(inner)
    edges, places = [], []
    known = edge_set(wiring)
    for column, receiver in enumerate(receivers):
        for row, sender in enumerate(senders):
            if (edge := Edge(sender, *receiver)) in known:
                edges.append(edge)
                places.append((column, row))
    effects: dict[Mode, Tensor] = {}
    together: dict[Mode, Tensor] = {}
    for mode in setting.modes:
        found = _effects(setting, mode, senders, groups, mediate)
        effects[mode] = found[[column for column, _ in places], [row for _, row in places]]
        if len(inner) > 1:
            together[mode] = found[-1]
    between = "MLPs recomputed, heads not" if mediate == "heads" else "direct edges alone"
    method = f"exact, sender to receiver, {between}"
    return SenderEffects(tuple(senders), tuple(edges), effects, together, method)


def _check(wiring: Wiring, senders: Sequence[str], receivers: Sequence[Receiver]) -> None:
    check_senders(wiring, senders)
    if not receivers:
        raise OptionError("no receiver is named; give one, as in --receivers logits")
    known = {tuple(receiver) for receiver in wiring.receivers}
    for component, port in receivers:
        if (component, port) not in known:
            wiring.component(component)
            raise GraphError(
                f"receiver {component}{':' + port if port else ''} does not exist in this model; "
                f"heads read through q, k or v, MLPs and logits without a port"
            )
    edges = edge_set(wiring)
    if not any(Edge(sender, *receiver) in edges for sender in senders for receiver in receivers):
        raise OptionError(
            f"no sender runs before a receiver: {senders[0]} does not reach {receivers[0][0]}; "
            f"name senders of earlier layers"
        )


def _effects(
    setting: Setting,
    mode: Mode,
    senders: Sequence[str],
    groups: Sequence[Sequence[Receiver]],
    mediate: Mediate,
) -> Tensor:
    """Effects by way of each group of receivers, ``[n_groups, n_senders, n_pairs]``."""
    rows, edges = setting.model.wiring.source_rows, edge_set(setting.model.wiring)
    order = sorted(range(len(senders)), key=lambda number: rows[senders[number]])
    effects = torch.zeros(len(groups), len(senders), len(setting.pairs), dtype=torch.float64)
    first = 0
    for patcher in setting.patchers(mode):
        columns = slice(first, first + len(patcher))
        size = patcher.at_once
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        for part in track(parts, f"patching {len(senders):,} senders"):
            sent = [rows[senders[number]] for number in part]
            heard = _sent(patcher, sent, mediate, {_block(patcher, r) for g in groups for r in g})
            for number, group in enumerate(groups):
                scores = _received(patcher, heard, group) - patcher.base_score
                # The rounding of a pass is no effect of what runs before no receiver.
                reach = [any(Edge(senders[n], *to) in edges for to in group) for n in part]
                scores = scores * scores.new_tensor(reach)[:, None]
                effects[number, part, columns] = scores.cpu()
        first = columns.stop
    return effects if mode == "noise" else -effects


def _block(patcher: Patcher, receiver: Receiver) -> _Block:
    """The receivers that read the same: heads or MLP of a layer, or the logits."""
    kind, layer, _ = patcher.model.wiring.component(receiver[0])
    return kind, layer


def _sent(
    patcher: Patcher, rows: Sequence[int], mediate: Mediate, needed: set[_Block]
) -> dict[_Block, Tensor]:
    """What receivers read more when a sender writes its other output and heads stay as they are.

    Args:
        patcher: The batch of pairs.
        rows: The senders, in forward order.
        mediate: Whether MLPs answer.
        needed: Blocks of receivers.

    Returns:
        ``[n_senders, batch, pos, d_model]`` for each block.
    """
    heard = {}
    answers = torch.zeros_like(patcher.difference[rows])
    for block in patcher.model.wiring.blocks():
        reached = bisect_left(rows, block.n_sources)
        stream = answers.clone()
        stream[:reached] += patcher.difference[rows[:reached]]
        key = ("head" if block.kind == "attention" else block.kind, block.layer)
        if key in needed:
            heard[key] = stream
        if block.kind == "mlp" and mediate == "heads" and reached:
            answers[:reached] += patcher.mlp(block.layer, stream[:reached])
    return heard


def _received(
    patcher: Patcher, heard: Mapping[_Block, Tensor], receivers: Sequence[Receiver]
) -> Tensor:
    """The metric when these receivers read what they heard, ``[n_senders, batch]``."""
    model = patcher.model
    ports: dict[int, dict[int, str]] = defaultdict(dict)
    mlps = set()
    for component, port in receivers:
        kind, layer, head = model.wiring.component(component)
        if kind == "logits":
            return patcher.scores(Site("resid_post", model.n_layers - 1), heard[kind, layer])
        if head is None:
            mlps.add(layer)
        else:
            ports[layer][head] = ports[layer].get(head, "") + port
    stream: Tensor | None = None
    layers = sorted({*ports, *mlps})
    for layer in range(layers[0], layers[-1] + 1):
        before = stream
        written = _heads(patcher, layer, ports[layer], heard.get(("head", layer)), stream)
        stream = _sum(stream, written)
        change = before if model.wiring.parallel else stream
        if layer in mlps:
            change = heard["mlp", layer]
        if change is not None:
            stream = _sum(stream, patcher.mlp(layer, change))
    assert stream is not None
    return patcher.scores(Site("resid_post", layers[-1]), stream)


def _heads(
    patcher: Patcher,
    layer: int,
    ports: Mapping[int, str],
    heard: Tensor | None,
    stream: Tensor | None,
) -> Tensor | None:
    """What the heads of a layer write more; receivers read ``heard``, other ports ``stream``."""
    groups: dict[str, list[int]] = defaultdict(list)
    for head in range(patcher.model.n_heads):
        groups["".join(sorted(ports.get(head, "")))].append(head)
    moved = None
    for read, heads in groups.items():
        change = {port: heard if port in read else stream for port in PORTS}
        known = {port: value for port, value in change.items() if value is not None}
        if known:
            z = patcher.attention(layer, known)
            moved = torch.zeros_like(z) if moved is None else moved
            moved[:, :, :, heads] = z[:, :, :, heads]
    if moved is None:
        return None
    return patcher.heads_output(layer, moved, [range(patcher.model.n_heads)])[0]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other
