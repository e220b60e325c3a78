"""Attention heads: what each reads, where it looks, what it writes, and how heads compose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import circuitlab

if TYPE_CHECKING:
    from collections.abc import Callable

    from circuitlab import CircuitGraph, Task, TracedModel

Top = Annotated[int | Literal["all"], "how many edges to keep, by absolute score"]
Threshold = Annotated[float | None, "keep those of at least this absolute score"]
Batch = Annotated[int | Literal["auto"], "prompts per pass"]


@circuitlab.hookimpl
def register_analyses(register: Callable[[str, Callable[..., CircuitGraph]], None]) -> None:
    """Offer ``attention-heads``, ``attention-scores``, ``head-circuits`` and ``norm-growth``."""
    register("attention-heads", attention_heads)
    register("attention-scores", attention_scores)
    register("head-circuits", head_circuits)
    register("norm-growth", norm_growth)


@circuitlab.hookimpl
def annotate_circuit(circuit: CircuitGraph, model: TracedModel, task: Task | None) -> None:
    """Put the role of each head, with its scores, on the heads of a circuit."""
    from circuitlab_attention_heads.annotating import annotate

    annotate(circuit, model, task)


def attention_heads(
    model: TracedModel,
    task: Task | None = None,
    *,
    ports: Annotated[Literal["all", "q", "k", "v"], "compositions to compare"] = "all",
    top: Top = 40,
    threshold: Threshold = None,
    remove_directions: Annotated[
        int, "also without this many directions that the whole residual stream shares"
    ] = 0,
    roles: Annotated[bool, "name heads by what they attend to on random tokens"] = True,
    role_threshold: Annotated[float, "attention that a role needs, 0 to 1"] = 0.4,
    effects: Annotated[bool, "also patch the edges: do weights and behaviour agree?"] = False,
    batch_size: Batch = "auto",
) -> CircuitGraph:
    """How heads compose, by their weights, and the role of each, by its attention.

    Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    from circuitlab_attention_heads.composing import attention_heads as compose

    return compose(
        model,
        task,
        ports=ports,
        top=top,
        threshold=threshold,
        remove_directions=remove_directions,
        roles=roles,
        role_threshold=role_threshold,
        effects=effects,
        batch_size=None if batch_size == "auto" else batch_size,
    )


def attention_scores(
    model: TracedModel,
    task: Task,
    *,
    heads: Annotated[str | None, "only these, as 'a1.h0, a2.*'; all if left out"] = None,
    query: Annotated[int, "query position, negative from the end"] = -1,
    against: Annotated[
        Literal["second", "rest"], "margin of the best key over the second, or over all others"
    ] = "second",
    temperatures: Annotated[bool, "also sharpen and flatten the attention by degrees"] = False,
    top: Top = 40,
    threshold: Threshold = None,
    batch_size: Batch = "auto",
) -> CircuitGraph:
    """Why heads look where they look: margins by component, and whether softmax is an argmax."""
    from circuitlab_attention_heads.scoring import attention_scores as score

    return score(
        model,
        task,
        heads=heads,
        query=query,
        against=against,
        temperatures=temperatures,
        top=top,
        threshold=threshold,
        batch_size=None if batch_size == "auto" else batch_size,
    )


def head_circuits(
    model: TracedModel,
    task: Task | None = None,
    *,
    head: Annotated[str | None, "the head, as a1.h0"] = None,
    tokens: Annotated[
        str | None, "tokens of the tables, as 'cat,dog,#17'; the task's if left out"
    ] = None,
    through: Annotated[str | None, "an earlier head whose output is the key's side"] = None,
    svd: Annotated[int, "singular directions of the OV circuit to show"] = 4,
    top_tokens: Annotated[int, "tokens named for each row of a table"] = 8,
    offsets: Annotated[str | None, "rotary models: distances query - key, as '0, 1, 8'"] = None,
) -> CircuitGraph:
    """What one head looks for and what it writes, in tokens and positions, from its weights."""
    from circuitlab_attention_heads.reading import head_circuits as read

    return read(
        model,
        task,
        head=head,
        tokens=tokens,
        through=through,
        svd=svd,
        top_tokens=top_tokens,
        offsets=offsets,
    )


def norm_growth(
    model: TracedModel,
    task: Task,
    *,
    top: Top = 40,
    threshold: Threshold = None,
    batch_size: Batch = "auto",
) -> CircuitGraph:
    """How the residual stream, what is written to it and the weights grow from layer to layer."""
    from circuitlab_attention_heads.growing import norm_growth as grow

    return grow(
        model,
        task,
        top=top,
        threshold=threshold,
        batch_size=None if batch_size == "auto" else batch_size,
    )
