"""Exact effects of edges, nodes and residual streams, as circuits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import (
    CircuitGraph,
    Edge,
    Heatmap,
    OptionError,
    Site,
    edge_effects,
    patchers,
    sharded,
    track,
)
from circuitlab_path_patching.measures import (
    Modes,
    effect_rows,
    modes_of,
    stronger,
    strongest,
    sure_effect,
)
from circuitlab_path_patching.patches import (
    Patch,
    at_positions,
    columns,
    node_patches,
    stream_patches,
)
from circuitlab_path_patching.paths.language import parse_components, parse_receivers

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Ablation, EncodedTask, Mode, Patcher, TracedModel

Top = int | Literal["all"]

_ELSE = "rest clean (noise) or corrupt (denoise), the larger; negative = helps"
EDGE_SCORE = f"metric with the edge's corrupt value - with its clean value, {_ELSE}"
TOTAL_SCORE = f"total effect: metric with its corrupt value - with its clean value, {_ELSE}"
#: Nodes whose direct share the result table names.
SHOWN = 5


@dataclass(frozen=True)
class Setting:
    """How effects are measured: see :func:`circuitlab.patchers`."""

    model: TracedModel
    pairs: EncodedTask
    mode: Modes = "both"
    ablation: Ablation = "counterfactual"
    batch_size: int | None = None
    seed: int = 0

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The runs that the mode asks for."""
        return modes_of(self.mode)

    def patchers(self, mode: Mode) -> Iterator[Patcher]:
        """One for each batch."""
        return patchers(
            self.model, self.pairs, mode=mode, ablation=self.ablation, batch_size=self.batch_size
        )

    def change(self) -> Tensor:
        """metric(corrupt) - metric(clean) of each pair, ``[n_pairs]``."""
        return torch.cat([p.other_score - p.base_score for p in self.patchers("noise")]).cpu()


def edge_circuit(
    setting: Setting,
    *,
    senders: str | None = None,
    receivers: str | None = None,
    top: Top = "all",
    threshold: float | None = None,
) -> CircuitGraph:
    """Every edge from a sender to a receiver patched alone; the strongest kept.

    Raises:
        OptionError: a sender or receiver does not exist, or no edge joins them.
        TaskError: positions of clean and corrupt prompts do not correspond.
    """
    model = setting.model
    edges = chosen_edges(model, senders, receivers)
    with sharded():
        effects: dict[Mode, Tensor] = {
            mode: edge_effects(
                model,
                setting.pairs,
                edges,
                mode=mode,
                ablation=setting.ablation,
                batch_size=setting.batch_size,
                stage=f"edges, {mode}",
            )
            for mode in setting.modes
        }
    kept = strongest(stronger(effects).tolist(), edges, top, threshold)
    circuit = empty_circuit(model, {name for n in kept for name in edges[n][:2]})
    for number, row in zip(kept, kept_rows(setting, effects, kept), strict=True):
        source, target, port = edges[number]
        circuit.add_effect(source, target, row.pop("score"), port=port, **row)
    circuit.graph |= {
        "score": EDGE_SCORE,
        "method": f"exact patching of {len(edges):,} edges, {' and '.join(setting.modes)}",
        "ablation": setting.ablation,
    }
    return circuit


def node_circuit(
    setting: Setting,
    *,
    positions: bool = False,
    senders: str | None = None,
    top: Top = "all",
    threshold: float | None = None,
) -> CircuitGraph:
    """Every component patched alone, at all positions together or at each one; strongest kept.

    A node's ``direct`` is the effect of its edge to the logits alone, ``direct_share`` is direct /
    total: near 1 what it writes is used as it is (a "final good"), near 0 other components work on
    it first (a "capital good").

    Raises:
        OptionError: a sender does not exist.
        TaskError: positions of clean and corrupt prompts do not correspond.
    """
    patches = node_patches(setting.model, senders)
    if positions:
        patches = [one for patch in patches for one in at_positions(patch, setting.pairs)]
    circuit, kept = total_circuit(setting, patches, top, threshold)
    end = Site("resid_post", setting.model.n_layers - 1)
    ways = [Patch(patch.name, end, patch.change) for patch in kept]
    direct = stronger(measure(setting, ways)).tolist() if ways else []
    shares = []
    for patch, effect in zip(kept, direct, strict=True):
        total = circuit.nodes[patch.name]["score"]
        share = effect / total if total else None
        circuit.nodes[patch.name].update(direct=effect, direct_share=share)
        shares.append(f"{patch.name} {'–' if share is None else f'{round(share, 2) + 0.0:.0%}'}")
    if shares:
        circuit.graph["findings"] = {
            "direct share": f"{', '.join(shares[:SHOWN])} (of the total effect, by the node's own "
            f"edge to the logits)"
        }
    circuit.graph["method"] = (
        f"exact patching of {len(patches):,} nodes, {' and '.join(setting.modes)}"
    )
    return circuit


def stream_circuit(
    setting: Setting, *, top: Top = "all", threshold: float | None = None
) -> CircuitGraph:
    """The residual stream patched at each layer and position; the strongest kept.

    A heat map, layers by positions, has all of them.

    Raises:
        TaskError: positions of clean and corrupt prompts do not correspond.
    """
    model = setting.model
    patches = [one for patch in stream_patches(model) for one in at_positions(patch, setting.pairs)]
    effects = measure(setting, patches)
    circuit, _ = total_circuit(setting, patches, top, threshold, effects)
    rows: dict[str, list[float]] = defaultdict(list)
    for patch, effect in zip(patches, stronger(effects).tolist(), strict=True):
        rows[str(patch.site)].append(effect)
    Heatmap(
        title="Where it matters",
        caption="The residual stream patched at each place. White is no effect, blue helps.",
        rows=list(rows)[::-1],  # layers rise
        columns=[
            name if "tokens" in data else f"{name} {data['token']}"
            for name, data in columns(setting.pairs)
        ],
        values=list(rows.values())[::-1],
        what=f"effect on {setting.pairs.metric.name}",
        row_label="stream",
        column_label="position",
    ).add_to(circuit)
    circuit.graph["method"] = (
        f"exact patching of {len(patches):,} stream positions, {' and '.join(setting.modes)}"
    )
    return circuit


# --- measuring ------------------------------------------------------------------------------------


def measure(setting: Setting, patches: Sequence[Patch]) -> dict[Mode, Tensor]:
    """Effects ``[n_patches, n_pairs]`` in each mode; negative helps in both.

    Raises:
        NumericsError: an activation is not finite.
    """
    by_site: dict[Site, list[int]] = defaultdict(list)
    for number, patch in enumerate(patches):
        by_site[patch.site].append(number)
    effects: dict[Mode, Tensor] = {}
    for mode in setting.modes:
        scores = []
        for patcher in setting.patchers(mode):
            size = patcher.at_once
            work = [
                (site, numbers[i : i + size])
                for site, numbers in sorted(by_site.items())
                for i in range(0, len(numbers), size)
            ]
            found = torch.zeros(len(patches), len(patcher), dtype=torch.float64)
            for site, numbers in track(work, f"patching {len(patches):,} places, {mode}"):
                change = torch.stack([patches[n].change(patcher) for n in numbers])
                found[numbers] = (patcher.scores(site, change) - patcher.base_score).cpu()
            scores.append(found if mode == "noise" else -found)
        effects[mode] = torch.cat(scores, 1)
    return effects


def chosen_edges(model: TracedModel, senders: str | None, receivers: str | None) -> list[Edge]:
    """Edges from any of the senders to any of the receivers, in the wiring's order.

    Raises:
        OptionError: a name does not exist, or no edge joins them.
    """
    wiring = model.wiring
    sources = set(parse_components(senders, wiring)) if senders else None
    targets = set(parse_receivers(receivers, wiring)) if receivers else None
    edges = [
        edge
        for edge in wiring.edges
        if (sources is None or edge.source in sources)
        and (targets is None or (edge.target, edge.port) in targets)
    ]
    if not edges:
        raise OptionError(
            f"no edge leads from senders {senders!r} to receivers {receivers!r}; a sender is read "
            f"by what runs after it"
        )
    return edges


def empty_circuit(model: TracedModel, names: set[str]) -> CircuitGraph:
    """A circuit of these components, ``input`` and ``logits``, without effects yet."""
    circuit = CircuitGraph()
    for name in (*model.wiring.sources, "logits"):
        if name in names or name in ("input", "logits"):
            kind, layer, head = model.wiring.component(name)
            data = {} if head is None else {"head": head}
            circuit.add_component(name, kind=kind, layer=layer, **data)
    circuit.graph["n_edges_total"] = model.wiring.n_edges
    return circuit


def total_circuit(
    setting: Setting,
    patches: Sequence[Patch],
    top: Top,
    threshold: float | None,
    effects: dict[Mode, Tensor] | None = None,
) -> tuple[CircuitGraph, list[Patch]]:
    """The circuit of the strongest patches, each with an arrow to the logits; and these patches."""
    effects = effects or measure(setting, patches)
    names = [patch.name for patch in patches]
    kept = strongest(stronger(effects).tolist(), names, top, threshold)
    circuit = CircuitGraph()
    for number in sorted(kept):
        circuit.add_component(names[number], **patches[number].data)
    circuit.add_component("logits", kind="logits", layer=setting.model.n_layers)
    for number, row in zip(kept, kept_rows(setting, effects, kept), strict=True):
        name, score = names[number], row.pop("score")
        circuit.nodes[name].update(score=score, **row)
        circuit.add_effect(name, "logits", score, kind="total", **row)
    circuit.graph |= {"score": TOTAL_SCORE, "ablation": setting.ablation}
    return circuit, [patches[number] for number in kept]


def kept_rows(
    setting: Setting, effects: Mapping[Mode, Tensor], kept: Sequence[int]
) -> list[dict[str, Any]]:
    """What is said of the kept effects, see :func:`.measures.effect_rows`."""
    if not kept:
        return []
    chosen = {mode: values[list(kept)] for mode, values in effects.items()}
    return effect_rows(chosen, setting.pairs, sure_effect(setting.change()), setting.seed)
