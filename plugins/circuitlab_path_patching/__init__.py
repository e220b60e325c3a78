"""Path patching: exact effects of nodes, edges, paths and sets of them, with gate types."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import circuitlab
from circuitlab_path_patching.search import acdc

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from circuitlab import CircuitGraph, EncodedTask, Task, TracedModel

Both = Annotated[
    Literal["noise", "denoise", "both"],
    "corrupt values into the clean run, clean values into the corrupt run, or both",
]
Ablated = Annotated[
    Literal["counterfactual", "zero", "mean"], "what an ablated component's output is replaced by"
]
Batch = Annotated[int | Literal["auto"], "pairs per pass"]


@circuitlab.hookimpl
def register_analyses(register: Callable[..., None]) -> None:
    """Offer ``path-patching``, ``acdc`` and three more."""
    register(
        "path-patching",
        path_patching,
        stream_only=True,
        shards={"scope": "edges"},
        pair_scores=scores_by_pair,
    )
    register("acdc", acdc)
    register("token-ablation", token_ablation, stream_only=True)
    register("dose-response", dose_response, stream_only=True)
    register("subspace-patching", subspace_patching)


def scores_by_pair(model: TracedModel, pairs: EncodedTask, **options: Any) -> Tensor:
    """Effects of each edge on each pair, ``[n_pairs, n_sources, n_receivers]``, scope ``edges``."""
    from circuitlab_path_patching.pair_scores import pair_scores

    return pair_scores(model, pairs, **options)


def path_patching(
    model: TracedModel,
    task: Task,
    *,
    scope: Annotated[
        Literal["edges", "nodes", "residual", "paths"], "what is patched, each one alone"
    ] = "edges",
    mode: Both = "both",
    ablation: Ablated = "counterfactual",
    positions: Annotated[bool, "nodes: patch each position alone"] = False,
    senders: Annotated[
        str | None, "only these components write, as 'a0.*, m1'; all if left out"
    ] = None,
    receivers: Annotated[
        str | None, "only these components read, as 'a2.1:q, logits'; all if left out"
    ] = None,
    path: Annotated[str | None, "paths: these and no others, as 'input>a0.1:k>a1.*>logits'"] = None,
    max_hops: Annotated[int | None, "paths: longest path searched, in edges"] = None,
    mediate: Annotated[
        Literal["heads", "all"] | None,
        "paths: from senders to receivers, with all heads between them frozen, or all components",
    ] = None,
    hypothesis: Annotated[
        Path | None, "paths: file of paths to test together, .toml, or one path a line"
    ] = None,
    gates: Annotated[bool, "find AND, OR, ADD and XOR among the strongest"] = False,
    groups: Annotated[
        str | None, "find them in these groups, as 'a0.0>m0 a0.1>m0; a1.2 a1.3'"
    ] = None,
    top: Annotated[int | Literal["all"], "how many to keep, by absolute score"] = 40,
    threshold: Annotated[float | None, "keep those of at least this absolute score"] = None,
    batch_size: Batch = "auto",
) -> CircuitGraph:
    """Patch edges, nodes, paths or residual streams, each one exactly, in both directions.

    Goldowsky-Dill et al. 2023 (arXiv:2304.05969), Wang et al. 2022 (arXiv:2211.00593).
    """
    asked = {name: value for name, value in locals().items() if name not in ("model", "task")}
    from circuitlab_path_patching.analysis import Asked, run

    return run(model, task, Asked(**asked))


def token_ablation(
    model: TracedModel,
    task: Task,
    *,
    how: Annotated[
        Literal["replace", "remove", "knock-out"],
        "put another token there, take it out, or hide it from attention",
    ] = "replace",
    order: Annotated[int, "size of the largest sets of tokens ablated together, 1 to 4"] = 2,
    top: Annotated[int, "sets of three and four are made of this many strongest tokens"] = 8,
    replacement: Annotated[
        str | None, "replace by this token, or #ID; else the corrupt prompt's, else drawn ones"
    ] = None,
    draws: Annotated[int, "drawn replacements to average over"] = 4,
    feature: Annotated[
        str | None, "measure this site along --direction and not the metric: 'resid_post.1[-1]'"
    ] = None,
    direction: Annotated[Path | None, "safetensors file of one vector"] = None,
    batch_size: Annotated[int | Literal["auto"], "prompts per pass"] = "auto",
) -> CircuitGraph:
    """Ablate the prompts' tokens, alone and together: which does the behaviour depend on?"""
    from circuitlab_path_patching.tokens.ablation import token_ablation as ablate

    return ablate(
        model,
        task,
        how=how,
        order=order,
        top=top,
        replacement=replacement,
        draws=draws,
        feature=feature,
        direction=direction,
        batch_size=batch_size,
    )


def dose_response(
    model: TracedModel,
    task: Task,
    *,
    mode: Both = "both",
    ablation: Ablated = "counterfactual",
    senders: Annotated[str | None, "only these components, as 'a0.*, m1'; all if left out"] = None,
    positions: Annotated[bool, "patch each position alone"] = False,
    low: Annotated[float, "smallest dose; 0 is the base run, 1 a full patch"] = 0.0,
    high: Annotated[float, "largest dose"] = 1.0,
    steps: Annotated[int, "number of doses; 0 and 1 are added"] = 11,
    top: Annotated[int | Literal["all"], "how many components to keep, by effect at dose 1"] = 12,
    batch_size: Batch = "auto",
) -> CircuitGraph:
    """Patch each component by degrees: where does the output begin to move, and how steeply?"""
    from circuitlab_path_patching.doses import dose_response as respond

    return respond(
        model,
        task,
        mode=mode,
        ablation=ablation,
        senders=senders,
        positions=positions,
        low=low,
        high=high,
        steps=steps,
        top=top,
        batch_size=None if batch_size == "auto" else batch_size,
    )


def subspace_patching(
    model: TracedModel,
    task: Task,
    *,
    site: Annotated[
        str, "where, as mlp_post.0[-1] or z.1.h0; all positions without [...]"
    ] = "resid_post.0[-1]",
    direction: Annotated[
        Path | Literal["mean-difference", "pca"],
        "of the pairs' own differences, or a safetensors file of [width] or [k, width]",
    ] = "mean-difference",
    mode: Both = "both",
    batch_size: Batch = "auto",
) -> CircuitGraph:
    """Patch a direction of a site, and check that it is not an interpretability illusion.

    Makelov, Lange & Nanda 2023 (arXiv:2311.17030).
    """
    from circuitlab_path_patching.subspaces import subspace_patching as patch

    return patch(
        model,
        task,
        site=site,
        direction=direction,
        mode=mode,
        batch_size=None if batch_size == "auto" else batch_size,
    )
