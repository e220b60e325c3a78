"""Feature interactions: dictionaries trained so that few features interact, and their circuit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import circuitlab

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from circuitlab import CircuitGraph, Task, TracedModel

Sets = Annotated[Path | None, "folder that `circuitlab dict train` wrote"]
Data = Annotated[
    Path | None, "file of texts, .txt or .jsonl; what the bundled model learned from, if left out"
]


@circuitlab.hookimpl
def register_analyses(register: Callable[[str, Callable[..., CircuitGraph]], None]) -> None:
    """Offer ``feature-interactions``."""
    register("feature-interactions", feature_interactions)


@circuitlab.hookimpl
def register_commands(register: Callable[..., None]) -> None:
    """Offer ``dict train``, ``dict eval``, ``dict compare`` and ``dict cards``."""
    register("dict train", train, stream_only=True)
    register("dict eval", evaluate)
    register("dict compare", compare_sets)
    register("dict cards", draw_up_cards)


def feature_interactions(
    model: TracedModel,
    task: Task,
    *,
    dictionaries: Sets = None,
    data: Data = None,
    n_tokens: Annotated[int, "tokens to measure on, those of the task's prompts first"] = 4096,
    top: Annotated[int | Literal["all"], "how many edges to keep, by absolute score"] = 20,
    min_coactivation: Annotated[int, "tokens at which both ends of an edge must be active"] = 20,
    verify: Annotated[int, "edges to ablate exactly, strong, middling and drawn at random"] = 50,
    cluster: Annotated[
        Literal["none", "label", "group"],
        "latents that are active together: numbered, or as one node of the circuit",
    ] = "none",
    compare: Annotated[Path | None, "another folder of dictionaries, to set beside"] = None,
    batch_size: Annotated[int | Literal["auto"], "prompts per pass"] = "auto",
) -> CircuitGraph:
    """How features of dictionaries make one another, and what they do to the task's metric.

    Farnik et al. 2025 (arXiv:2502.18147) across an MLP; also across whole blocks.
    """
    from circuitlab_feature_interactions.circuits import feature_interactions as trace

    return trace(
        model,
        task,
        dictionaries=dictionaries,
        data=data,
        n_tokens=n_tokens,
        top=top,
        min_coactivation=min_coactivation,
        verify=verify,
        cluster=cluster,
        compare=compare,
        batch_size=None if batch_size == "auto" else batch_size,
    )


def train(
    model: TracedModel,
    *,
    sites: Annotated[
        str,
        "pairs of sites: 'mlp.0', 'block.1', 'transcoder.0', or all 'mlp', 'block', 'transcoder'; "
        "several with commas",
    ] = "mlp.0",
    arch: Annotated[Literal["topk", "relu", "jumprelu", "gated"], "nonlinearity"] = "topk",
    k: Annotated[int, "latents active at once: exactly for topk, aimed at for others"] = 8,
    expansion: Annotated[float, "latents / width of the site"] = 4.0,
    interaction: Annotated[
        Literal["none", "l1", "l1l2", "hoyer", "log", "group"], "penalty on interactions"
    ] = "l1",
    strength: Annotated[float, "weight of that penalty, per active target latent"] = 0.024,
    estimator: Annotated[
        str,
        "how it is estimated: from some tokens of each step, 'tokens:64', some active latents, "
        "'rows:4', both, 'rows:4,tokens:64', or all of them, 'exact', which takes longer",
    ] = "tokens:64",
    warmup: Annotated[
        float, "share of the steps in which the penalty grows to its strength"
    ] = 0.05,
    steps: Annotated[int, "optimiser steps"] = 1500,
    batch_tokens: Annotated[int, "tokens per step"] = 512,
    learning_rate: Annotated[float | None, "of Adam; by the architecture if left out"] = None,
    sparsity: Annotated[
        float | None, "fixed weight of the sparsity loss; if left out, steered to --k"
    ] = None,
    data: Data = None,
    context_length: Annotated[
        int | None, "longest prompt, in tokens; the model's if left out"
    ] = None,
    output: Annotated[Path, "folder to write; an unfinished training there goes on"] = Path(
        "dictionaries"
    ),
    checkpoint_every: Annotated[int, "steps between two states on disk"] = 200,
) -> Mapping[str, Any]:
    """Train dictionaries of a model's sites together, with few interactions between them."""
    asked = {name: value for name, value in locals().items() if name != "model"}
    from circuitlab_feature_interactions.train_command import train_dictionaries

    return train_dictionaries(model, **asked)


def evaluate(
    model: TracedModel,
    *,
    dictionaries: Sets = None,
    data: Data = None,
    n_tokens: Annotated[int, "tokens to measure on"] = 50_000,
    per_position: Annotated[bool, "every number also by position in the prompt"] = False,
    controls: Annotated[
        bool, "the same of a shuffled Jacobian, random directions, k-means, PCA, ICA, new weights"
    ] = False,
    independent: Annotated[
        Path | Literal["train"] | None,
        "folder of dictionaries without the penalty, to set beside; 'train' trains them now",
    ] = None,
    context_length: Annotated[int | None, "longest prompt, in tokens"] = None,
) -> Mapping[str, Any]:
    """Measure dictionaries on fresh prompts: reconstruction, loss, sparsity, interactions."""
    if dictionaries is None:
        raise circuitlab.OptionError(
            "there is nothing to evaluate; name a folder that `circuitlab dict train` wrote "
            "(--dictionaries FOLDER)"
        )
    import torch

    from circuitlab_feature_interactions.evaluating import evaluate_dictionaries

    return evaluate_dictionaries(
        model,
        dictionaries=dictionaries,
        data=data,
        n_tokens=n_tokens,
        per_position=per_position,
        controls=controls,
        independent=independent,
        context_length=context_length,
        seed=torch.initial_seed(),
    )


def compare_sets(
    model: TracedModel,
    *,
    dictionaries: Annotated[
        str | None, "folders of sets, with commas between them; a folder of sets stands for all"
    ] = None,
    data: Data = None,
    n_tokens: Annotated[int, "tokens to measure on"] = 20_000,
    reconstruction: Annotated[
        Literal["r2", "kl", "ce"], "what is to be equal: R², or what of KL or loss is recovered"
    ] = "r2",
    controls: Annotated[
        bool, "beside: random directions, PCA, ICA, and the first set on new weights"
    ] = False,
    context_length: Annotated[int | None, "longest prompt, in tokens"] = None,
    output: Annotated[Path, "picture to write, .plot.svg, .plot.png, .plot.pdf, or .json"] = Path(
        "interactions.plot.svg"
    ),
) -> Mapping[str, Any]:
    """Compare dictionaries with and without the penalty at equal reconstruction."""
    if dictionaries is None:
        raise circuitlab.OptionError(
            "there is nothing to compare; name folders that `circuitlab dict train` wrote, some "
            "with --interaction none (--dictionaries FOLDER,FOLDER)"
        )
    import torch

    from circuitlab_feature_interactions.compare_command import compare_dictionaries

    return compare_dictionaries(
        model,
        dictionaries=dictionaries,
        data=data,
        n_tokens=n_tokens,
        reconstruction=reconstruction,
        controls=controls,
        context_length=context_length,
        output=output,
        seed=torch.initial_seed(),
    )


def draw_up_cards(
    model: TracedModel,
    *,
    dictionaries: Sets = None,
    features: Annotated[
        str, "latents: 'top:12', so many of each site, or 'mlp_in.0: 3, 17; mlp_out.0: 5'"
    ] = "top:12",
    data: Data = None,
    n_tokens: Annotated[int, "tokens to measure on"] = 20_000,
    context_length: Annotated[int | None, "longest prompt, in tokens"] = None,
    output: Annotated[
        Path, "page to write, .html; or a picture, .svg; or a folder for a picture of each card"
    ] = Path("cards.html"),
) -> Mapping[str, Any]:
    """Draw up cards of features, each beside a random direction, as a static page or as SVG."""
    if dictionaries is None:
        raise circuitlab.OptionError(
            "there is nothing to draw up cards of; name a folder that `circuitlab dict train` "
            "wrote (--dictionaries FOLDER)"
        )
    import torch

    from circuitlab_feature_interactions.cards.making import feature_cards

    return feature_cards(
        model,
        dictionaries=dictionaries,
        features=features,
        data=data,
        n_tokens=n_tokens,
        context_length=context_length,
        output=output,
        seed=torch.initial_seed(),
    )
