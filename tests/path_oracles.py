"""Patching by brute force: one full forward pass of a plain Hugging Face model at a time.

Every number comes from :class:`hooked_passes.Pass`, the stock model under hooks. All functions take
:class:`Runs` and return logits after the last token, ``[batch, vocab]``; the caller applies the
metric. Mode ``denoise`` is ``noise`` with the two prompts exchanged.

Definitions: Goldowsky-Dill et al. 2023 (arXiv:2304.05969) for paths and hypotheses, Wang et al.
2022 (arXiv:2211.00593) for senders and receivers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from hooked_passes import PORTS, Edge, Pass, Plain, Receiver
from torch import Tensor, nn

#: ``(component, ports)`` from source to last receiver; a head's ports are letters of ``"qkv"``.
Nodes = Sequence[tuple[str, str]]
Member = str | Edge


@dataclass(frozen=True)
class Runs:
    """A batch run in its base state, and what every source writes in the other state.

    Mode ``noise``: base is the clean run. ``denoise``: base is the corrupt run, other the clean.
    """

    model: Plain
    ids: Tensor
    mask: Tensor
    base: Pass
    other: dict[str, Tensor]
    other_ids: Tensor | None
    mode: str

    def run(self, **changes: Any) -> Pass:
        return Pass(self.model, **changes).run(self.ids, self.mask)


def runs(
    module: nn.Module,
    clean: Tensor,
    corrupt: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    mode: str = "noise",
    ablation: str = "counterfactual",
) -> Runs:
    """Both runs of a batch, padded on the left; ``zero`` and ``mean`` are ablations of the base."""
    if mode not in ("noise", "denoise") or ablation not in ("counterfactual", "zero", "mean"):
        raise ValueError(f"mode {mode!r} with ablation {ablation!r} does not exist")
    model = Plain(module)
    mask = torch.ones_like(clean) if mask is None else mask
    base_ids, other_ids = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    if base_ids is None:
        raise ValueError("mode denoise needs corrupt prompts; give them")
    base = Pass(model).run(base_ids, mask)
    other = {source: torch.zeros_like(output) for source, output in base.outputs.items()}
    if ablation == "counterfactual":
        if other_ids is None:
            raise ValueError("ablation counterfactual needs corrupt prompts; give them")
        other = Pass(model).run(other_ids, mask).outputs
    elif ablation == "mean":
        other = {s: o[mask.bool()].mean(0).expand_as(o) for s, o in base.outputs.items()}
    return Runs(model, base_ids, mask, base, other, other_ids, mode)


def patched_node(run: Runs, source: str, where: Tensor | None = None) -> Tensor:
    """A source writes its other output, at all positions or where ``where`` ``[batch, pos]`` is."""
    value = run.other[source]
    if where is not None:
        value = torch.where(where[..., None], value, run.base.outputs[source])
    return run.run(writes={source: value}).logits


def site_difference(run: Runs, kind: str, layer: int) -> Tensor:
    """Other less base residual stream at a site, ``[batch, pos, d_model]``, both runs whole."""
    block, caught = run.model.blocks[layer], []

    def after(_: Any, __: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    places = {
        "resid_pre": lambda: block.register_forward_pre_hook(lambda _, a: caught.append(a[0])),
        "resid_mid": lambda: run.model.norms(layer)[1].register_forward_pre_hook(
            lambda _, a: caught.append(a[0])
        ),
        "resid_post": lambda: block.register_forward_hook(after),
    }
    handle = places[kind]()
    try:
        for ids in (run.other_ids, run.ids):
            assert ids is not None
            Pass(run.model).run(ids, run.mask)
    finally:
        handle.remove()
    return caught[0] - caught[1]


def patched_site(run: Runs, kind: str, layer: int, where: Tensor | None = None) -> Tensor:
    """The whole stream at a site is the other run's, at all positions or where ``where`` is."""
    change = site_difference(run, kind, layer)
    return pushed_site(run, kind, layer, change if where is None else change * where[..., None])


def pushed_site(run: Runs, kind: str, layer: int, change: Tensor) -> Tensor:
    """``change`` is added to the stream at a site, and all after it is recomputed."""
    return run.run(adds={(kind, layer): change}).logits


def patched_edges(run: Runs, edges: Collection[Edge]) -> Tensor:
    """All ``edges`` at once carry the source's other output; all other reads are recomputed."""
    return run.run(mixes={edge: run.other[edge[0]] for edge in edges}).logits


def patched_path(run: Runs, nodes: Nodes) -> Tensor:
    """One path carries the other value: only the components on it are recomputed, one by one.

    After a last component that is not ``logits`` everything is recomputed, as for an edge.
    """
    value, before = run.other[nodes[0][0]], nodes[0][0]
    for name, ports in nodes[1:]:
        change = value - run.base.outputs[before]
        reads = {(name, port): run.base.inputs[name, port] + change for port in ports or ("",)}
        changed = run.run(reads=reads)
        if name != "logits":
            value, before = changed.outputs[name], name
    return changed.logits


def patched_receivers(
    run: Runs,
    senders: Collection[str],
    receivers: Collection[Receiver],
    *,
    mediate: str = "heads",
    fixed: bool = True,
) -> Tensor:
    """Receivers read what reaches them from the senders alone (Wang et al. 2022).

    First pass: senders write their other output, all other heads are frozen, and with ``mediate``
    ``heads`` MLPs are recomputed, with ``all`` frozen too. Second pass: the receivers read as they
    did in the first, everything else is recomputed. With ``fixed=False`` a receiver behind another
    one reads the change of the first pass on top of what is recomputed in the second.
    """
    if mediate not in ("heads", "all"):
        raise ValueError(f"mediate {mediate!r} does not exist; choose heads or all")
    frozen = {s: o for s, o in run.base.outputs.items() if mediate == "all" or s[0] != "m"}
    held = frozen | {sender: run.other[sender] for sender in senders}
    first = run.run(writes=held)
    if fixed:
        return run.run(reads={key: first.inputs[key] for key in receivers}).logits
    return run.run(
        pushes={key: first.inputs[key] - run.base.inputs[key] for key in receivers}
    ).logits


def treeified(
    run: Runs, inside: Mapping[str, Tensor], outside: Mapping[str, Tensor], paths: Sequence[Nodes]
) -> Tensor:
    """The model unrolled into a tree of paths: sources of ``paths`` are ``inside``, others outside.

    Plain recursion from ``logits`` back, every component recomputed for every path that leads from
    it. A path is given with one port or several for each head; it takes in all that begins before
    its first component. A component no path of the set runs through writes its ``outside`` output,
    which for a counterfactual is what recomputing all of its tree would give.
    """
    heard = dict(run.model.receivers())
    single = {split for nodes in paths for split in _single_ports(nodes)}
    # Every end of a path, its first component without the port that is no part of the end.
    begun = {((p[i][0], ""), *p[i + 1 :]) for p in single for i in range(len(p))}

    def stream(receiver: Receiver, suffix: tuple[Receiver, ...]) -> Tensor:
        behind = (receiver, *suffix)
        total = run.base.inputs[receiver]
        for source in heard[receiver]:
            total = total + (write(source, behind) - run.base.outputs[source])
        return total

    def write(source: str, behind: tuple[Receiver, ...]) -> Tensor:
        if ((source, ""), *behind) in single:
            return inside[source]
        if ((source, ""), *behind) not in begun:
            return outside[source]
        ports = PORTS if source[0] == "a" else ("",)
        reads = {(source, port): stream((source, port), behind) for port in ports}
        return run.run(reads=reads).outputs[source]

    end = ("logits", "")
    return run.run(reads={end: stream(end, ())}).logits


def _single_ports(nodes: Nodes) -> Iterator[tuple[Receiver, ...]]:
    choices = [[(name, port) for port in ports or ("",)] for name, ports in nodes]
    return product(*choices)


def patched_paths(run: Runs, paths: Sequence[Nodes]) -> Tensor:
    """All ``paths`` to logits at once carry the other value, all other paths the base value."""
    return treeified(run, run.other, run.base.outputs, paths)


def hypothesis(run: Runs, paths: Sequence[Nodes]) -> Tensor:
    """The hypothesis that ``paths`` alone matter: they keep the base, all others get the other."""
    return treeified(run, run.base.outputs, run.other, paths)


def unexplained(
    run: Runs, paths: Sequence[Nodes], distance: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Distance of the hypothesis from the base run, ``[batch]``.

    Its mean is the average unexplained effect (AUE); of no paths the average total effect (ATE).
    """
    return distance(run.base.logits, hypothesis(run, paths))


def mixtures(run: Runs, members: Sequence[Member]) -> Tensor:
    """All mixtures of a group of nodes or edges, ``[2**k, batch, vocab]``.

    Bit i of the row is set where member i carries its clean value. The members that differ from the
    base are patched together, a node by all of its edges.
    """
    rows = []
    for row in range(1 << len(members)):
        # The base is all clean in noise, all corrupt in denoise.
        base_bit = int(run.mode == "noise")
        changed = [m for i, m in enumerate(members) if (row >> i & 1) != base_bit]
        edges = [e for e in run.model.edges() if e in changed or e[0] in changed]
        rows.append(patched_edges(run, edges))
    return torch.stack(rows)


def all_paths(model: Plain) -> list[tuple[Receiver, ...]]:
    """Every path from input to logits, one port for each head, by recursion from the end."""
    heard = dict(model.receivers())

    def into(component: str) -> Iterator[tuple[Receiver, ...]]:
        if component == "input":
            yield (("input", ""),)
            return
        for receiver in heard:
            if receiver[0] == component:
                for source in heard[receiver]:
                    yield from ((*path, receiver) for path in into(source))

    return list(into("logits"))
