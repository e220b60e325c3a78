"""Path hypotheses: how much of the behaviour these paths carry alone.

The model is treeified: every path from the input has copies of all components on it. The paths of
the hypothesis read the one prompt of a pair, all other paths the other (Goldowsky-Dill et al. 2023,
arXiv:2304.05969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from circuitlab import (
    Interval,
    OptionError,
    ResourceError,
    choose_batch_size,
    distinct_rows,
    ratio_interval,
    track,
)
from circuitlab_path_patching.measures import NEGLIGIBLE, sure_effect
from circuitlab_path_patching.paths.trees import PathTrees, row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, Mode, TracedModel
    from circuitlab_path_patching.effects import Setting
    from circuitlab_path_patching.paths.hypothesis_files import Hypothesis

#: Bytes that the changed outputs of one hypothesis may take.
MEMORY = 512 * 2**20


@dataclass(frozen=True)
class Explained:
    """How much of the effect a hypothesis explains.

    With the metric M and a pair's clean and corrupt prompt, G is the model in which the hypothesis'
    paths read the prompt that ``mode`` patches in, and all others the base prompt.

    Attributes:
        name: Of the hypothesis.
        mode: ``denoise``: its paths read the clean prompt, all others the corrupt one, as in the
            paper. ``noise``: its paths read the corrupt prompt, all others the clean one.
        n_paths: Number of its paths.
        n_nodes: Different components recomputed or exchanged for it: its cost per pair.
        aue: Average unexplained effect, mean of abs(M(clean) - M(G)) over pairs. The difference is
            taken pair by pair, so errors of opposite sign do not cancel. In mode ``noise`` it is
            that of the opposite hypothesis, that all other paths alone carry the behaviour.
        ate: Average total effect, mean of abs(M(clean) - M(corrupt)).
        explained: Mode ``denoise``: 1 - aue / ate, the share of the effect that these paths keep up
            by themselves; below 0 where they do worse than none. Mode ``noise``: aue / ate, the
            share that is lost without them. None where there is no effect.
        interval: Bootstrap over pairs of ``explained``, 95 %; None for one pair or no effect.
        weak: Whether the mean effect is less than three standard errors from 0: the share of an
            effect that may be none says nothing.
    """

    name: str
    mode: Mode
    n_paths: int
    n_nodes: int
    aue: float
    ate: float
    explained: float | None
    interval: Interval | None
    weak: bool


def check_hypotheses(setting: Setting, hypotheses: Sequence[Hypothesis]) -> list[Explained]:
    """Measure how much of the effect each hypothesis explains: all in one mode, then in the other.

    The distance of two outputs is the absolute difference of the task's metric; with the metric
    ``kl-divergence`` that is the KL divergence from the clean output.

    Args:
        setting: What is measured; of its modes see :class:`Explained`. The ablation is what paths
            read in mode ``noise`` in place of the clean prompt.
        hypotheses: Their paths end at ``logits``. A path that begins after ``input`` stands for all
            paths that end so.

    Raises:
        OptionError: a path does not end at ``logits``, or mode ``denoise`` with another ablation
            than ``counterfactual``.
        GraphError: a path does not run forward in the model.
        ResourceError: a hypothesis is too large for a single pair; the message says how large.
        NumericsError: an activation is not finite.
    """
    trees = [_tree(setting.model, hypothesis) for hypothesis in hypotheses]
    return [
        _measured(setting, hypothesis, tree, mode)
        for mode in setting.modes
        for hypothesis, tree in zip(hypotheses, trees, strict=True)
    ]


def write_hypotheses(circuit: CircuitGraph, results: Sequence[Explained]) -> None:
    """Put results into ``graph["hypotheses"]``, and lines into its findings and warnings.

    Each is ``name``, ``mode``, ``explained``, ``lo`` and ``hi`` (None where not measured),
    ``n_paths``, ``n_nodes``, ``aue`` and ``ate``.
    """
    warnings = circuit.graph.setdefault("warnings", [])
    findings = circuit.graph.setdefault("findings", {})
    rows = circuit.graph.setdefault("hypotheses", [])
    for result in results:
        low, high = result.interval or (None, None)
        rows.append(
            {
                "name": result.name,
                "mode": result.mode,
                "explained": result.explained,
                "lo": low,
                "hi": high,
                "n_paths": result.n_paths,
                "n_nodes": result.n_nodes,
                "aue": result.aue,
                "ate": result.ate,
            }
        )
        findings[f"{result.name}: {_does(result)}"] = _text(result)
    if any(result.weak for result in results):
        warnings.append(
            "the effect that hypotheses explain a share of is within three standard errors of 0; "
            "the shares say little: use more pairs"
        )


def _does(result: Explained) -> str:
    """``2 paths alone keep``, what a result is the share of."""
    one = result.n_paths == 1
    paths = f"{result.n_paths:,} path{'' if one else 's'}"
    if result.mode == "denoise":
        return f"{paths} alone keep{'s' if one else ''}"
    return f"{paths} corrupted alone lose{'s' if one else ''}"


def _text(result: Explained) -> str:
    if result.explained is None:
        return "no effect to explain"
    text = f"{result.explained:.1%} of the effect"
    if result.interval is None:
        return text
    return f"{text} (95 %: {result.interval[0]:.1%} to {result.interval[1]:.1%})"


def _tree(model: TracedModel, hypothesis: Hypothesis) -> PathTrees:
    for path in hypothesis.paths:
        if path.nodes[-1][0] != "logits":
            raise OptionError(
                f"hypothesis {hypothesis.name!r}: path {path} ends at {path.nodes[-1][0]}, and the "
                f"metric is read at logits; say how it goes on, as in {path}>logits"
            )
    tree = PathTrees(model.wiring)
    tree.add(hypothesis.paths)
    return tree


def _batch_size(setting: Setting, hypothesis: Hypothesis, n_nodes: int) -> int:
    """Pairs per batch such that the nodes of the tree fit into memory."""
    model, pairs = setting.model, setting.pairs
    per_pair = n_nodes * row_bytes(model, 1, pairs.clean.ids.shape[1])
    if per_pair > MEMORY:
        raise ResourceError(
            f"hypothesis {hypothesis.name!r} of {len(hypothesis.paths):,} paths has {n_nodes:,} "
            f"different nodes, {per_pair / 2**30:.1f} GiB for each pair; name fewer paths, or "
            f"shorter ones: a path that begins at a component stands for all that lead to it"
        )
    fitting = min(choose_batch_size(model, pairs), MEMORY // per_pair)
    return fitting if setting.batch_size is None else min(fitting, setting.batch_size)


def _measured(setting: Setting, hypothesis: Hypothesis, tree: PathTrees, mode: Mode) -> Explained:
    size = _batch_size(setting, hypothesis, len(tree.nodes))
    clean, other, patched = _scores(
        replace(setting, batch_size=size), tree, mode, f"testing hypothesis {hypothesis.name}"
    )
    missed, whole = (clean - patched).abs(), (clean - other).abs()
    distinct = distinct_rows(setting.pairs)
    total, ratio, interval = float(whole.mean()), None, None
    if total > NEGLIGIBLE * float((clean.abs() + other.abs()).mean()):
        ratio = float(missed.mean()) / total
        interval = ratio_interval(missed[distinct], whole[distinct], setting.seed)
        if mode == "denoise":
            ratio = 1 - ratio
            interval = interval and (1 - interval[1], 1 - interval[0])
    return Explained(
        name=hypothesis.name,
        mode=mode,
        n_paths=len(hypothesis.paths),
        n_nodes=len(tree.nodes),
        aue=float(missed.mean()),
        ate=total,
        explained=ratio,
        interval=interval,
        weak=ratio is None or sure_effect((other - clean)[distinct]) is None,
    )


def _scores(
    setting: Setting, tree: PathTrees, mode: Mode, title: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The metric of the clean run, the corrupt run and the hypothesis, ``[n_pairs]`` each."""
    parts: list[Tensor] = []
    assert setting.batch_size is not None
    total = -(-len(setting.pairs) // setting.batch_size)
    for patcher in track(setting.patchers(mode), title, total=total):
        ends = [patcher.base_score, patcher.other_score]
        clean, other = ends if mode == "noise" else ends[::-1]
        parts.append(torch.stack([clean, other, tree.scores(patcher)[0]]).cpu())
    clean, other, patched = torch.cat(parts, 1)
    return clean, other, patched
