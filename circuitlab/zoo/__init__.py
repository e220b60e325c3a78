"""The zoo: small models that come with CircuitLab, each with a task of the same name.

Trained models are ordinary Hugging Face GPT-2s of at most 160,000 parameters; the recipe that made
each one is here too. Hand-made models have weights written down by a formula, so their true circuit
is known. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from circuitlab.errors import ModelError
from circuitlab.tasks import Task
from circuitlab.zoo import (
    circle,
    docstring_mini,
    greater_than,
    hand,
    induction,
    ioi_mini,
    superposition,
)
from circuitlab.zoo.recipe import Recipe

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

__all__ = [
    "MODELS",
    "BundledModel",
    "corpus",
    "digest",
    "evaluate",
    "folder",
    "known_edges",
    "load",
    "save",
    "tasks",
    "tokenizer",
    "train",
    "untrained",
]

#: Held-out pairs an evaluation draws, afresh and not from the task.
N_EVALUATION = 512

_WEIGHTS = Path(__file__).parent / "weights"
_RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (induction, ioi_mini, greater_than, docstring_mini, superposition)
}
_TASKS = (
    induction.TASK,
    ioi_mini.TASK,
    greater_than.TASK,
    docstring_mini.TASK,
    superposition.TASK,
    *hand.TASKS,
    *circle.TASKS,
    *superposition.TASKS,
)
_MECHANISMS = (
    hand.MECHANISMS | dict.fromkeys(circle.CIRCLES, circle.MECHANISM) | superposition.MECHANISMS
)
_EFFECTIVE = (
    hand.EFFECTIVE | dict.fromkeys(circle.CIRCLES, circle.EFFECTIVE) | superposition.EFFECTIVE
)


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A model of the zoo.

    Attributes:
        kind: ``trained``: weights from a recipe; ``hand``: weights from a formula.
        description: One line.
        task: Name of the task it does.
        shape: Layers, heads and width in words.
    """

    name: str
    kind: Literal["trained", "hand"]
    description: str
    task: str
    shape: str


def _trained(name: str, description: str) -> BundledModel:
    recipe = _RECIPES[name]
    layers, heads = (
        f"{n} {noun}" + "s" * (n > 1)
        for n, noun in ((recipe.n_layers, "layer"), (recipe.n_heads, "head"))
    )
    size = f"{layers}, {heads}, d_model {recipe.d_model}"
    return BundledModel(
        name, "trained", description, name, size + ", no MLP" * recipe.attention_only
    )


#: All bundled models by name.
MODELS: dict[str, BundledModel] = {
    model.name: model
    for model in (
        _trained("induction", "previous-token and induction heads complete a repeated series"),
        _trained("ioi-mini", "names the person who receives; its own algorithm, not GPT-2's"),
        _trained("greater-than", "ends a span of years later than it began"),
        _trained("docstring-mini", "documents a function's arguments in order, by attention alone"),
        _trained("and-superposition", "the ANDs of 32 pairs of 16 inputs, by 24 ReLUs"),
        BundledModel(
            "hand-induction",
            "hand",
            "an induction circuit of 7 known edges, attention saturated",
            "hand-induction",
            "2 layers, 2 heads, d_model 78, no norms",
        ),
        *(
            BundledModel(
                gate.name,
                "hand",
                gate.description,
                gate.name,
                "1 layer, 2 heads, d_model 16, no norms",
            )
            for gate in hand.GATES.values()
        ),
        *(
            BundledModel(
                name,
                "hand",
                f"says whether a word came before; {words.n_words:,} words in 2 dimensions",
                name,
                "1 layer, 1 head, d_model 64, no norms",
            )
            for name, words in circle.CIRCLES.items()
        ),
        BundledModel(
            "hand-and",
            "hand",
            "the ANDs of all 120 pairs of 16 inputs, by 31 ReLUs",
            "hand-and",
            "1 layer, 1 head, d_model 64, no norms",
        ),
        BundledModel(
            "hand-planted",
            "hand",
            "16 features, each made of two of 16 others by a known graph",
            "hand-planted",
            "1 layer, 1 head, d_model 33, no norms",
        ),
        BundledModel(
            "hand-interference",
            "hand",
            "says A, and holds A xor B by an interference of known size",
            "hand-interference",
            "1 layer, 1 head, d_model 16, no norms",
        ),
    )
}


def tasks() -> tuple[Task, ...]:
    """The tasks of all bundled models, named like them; the trained ones' pairs are held out."""
    return _TASKS


def corpus(name: str, n: int, seed: int = 0) -> list[str]:
    """``n`` texts like those a trained model learned from, the same for the same seed.

    Those of a model made by a formula are drawn at random where it is one of superposition, else
    the prompts of its task, over and over.

    Raises:
        ModelError: there is no such model.
    """
    rng = Random(f"{name} corpus {seed}")  # noqa: S311  # data, not secrets
    if name in superposition.TEXTS:
        return [superposition.TEXTS[name](rng) for _ in range(n)]
    if _entry(name).kind == "hand":
        task = next(task for task in _TASKS if task.name == name)
        prompts = [str(prompt) for pair in task.pairs for prompt in (pair.clean, pair.corrupt)]
        return [prompts[rng.randrange(len(prompts))] for _ in range(n)]
    recipe = _RECIPES[name]
    return [recipe.example(rng).text for _ in range(n)]


def folder(name: str) -> Path:
    """The folder of a trained model, in Hugging Face layout.

    Raises:
        ModelError: there is no such model, or it is made by a formula.
    """
    _recipe(name, "has no folder: its weights are a formula; use zoo.load")
    return _WEIGHTS / name


def load(name: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """The bundled model ``name``, in eval mode with frozen parameters, and its tokenizer.

    Attention is eager, so that its probabilities can be read. The random state is left alone.

    Raises:
        ModelError: there is no such model, or its files are missing or damaged.
    """
    if _entry(name).kind == "hand":
        from circuitlab.zoo.compiling import compile_model

        return compile_model(name)
    from circuitlab.zoo.files import read

    commit = digest(name)
    module, tokenizer = read(name, folder(name))
    # Where the hub's own loader leaves a model's commit.
    module.config._commit_hash = commit
    return module, tokenizer


def digest(name: str) -> str | None:
    """First 12 hexadecimal digits of the SHA-256 of a trained model's weights; None for a formula.

    Raises:
        ModelError: there is no such model, or its weights are missing or not those that came with
            this version.
    """
    if _entry(name).kind == "hand":
        return None
    weights = folder(name) / "model.safetensors"
    try:
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        listed = (_WEIGHTS / "SHA256SUMS").read_text("ascii")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"bundled model {name!r} cannot be read: {error}; reinstall circuitlab"
        ) from error
    if f"{found}  {name}/{weights.name}" not in listed.splitlines():
        raise ModelError(
            f"the weights of bundled model {name!r} are not those that came with this version "
            f"(SHA-256 {found[:12]}…): the file is damaged or was changed; reinstall circuitlab"
        )
    return found[:12]


def train(
    name: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    keep: Callable[[int, GPT2LMHeadModel], None] | None = None,
    keep_every: int = 1,
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, dict[str, float]]:
    """Run a model's recipe again: the module, its tokenizer, and its held-out metrics.

    Takes about a minute on one thread. Another machine, or version of torch, gives other weights of
    the same quality; the same one gives the same weights for the same seed.

    Args:
        name: Of a trained model, see :data:`MODELS`.
        seed: Of weights and data.
        steps: Optimiser steps; those of the recipe if None.
        progress: Called with step, total and ``{"loss": nats}``.
        keep: Called with the number of steps done and the module as it is then: before the first
            step, every ``keep_every`` steps, and at the end.
        keep_every: Steps between two of these calls.

    Raises:
        ModelError: there is no such model, or it is not trained.
    """
    recipe = _recipe(name, "is compiled, not trained; use zoo.load")
    module = _carry_out(
        recipe, seed=seed, steps=steps, progress=progress, keep=keep, keep_every=keep_every
    )
    words = tokenizer(name)
    return module, words, evaluate(name, module, words)


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a trained model, as its recipe makes it.

    Raises:
        ModelError: there is no such model, or it is not trained.
    """
    recipe = _recipe(name, "is compiled; zoo.load gives its tokenizer")
    from circuitlab.zoo.word_tokenizer import word_tokenizer

    return word_tokenizer(recipe.vocabulary, recipe.n_positions)


def untrained(name: str, seed: int = 0) -> GPT2LMHeadModel:
    """A trained model before the first step of its recipe; raises as :func:`train`."""
    recipe = _recipe(name, "is compiled, not trained, and never had other weights")
    return _carry_out(recipe, seed=seed, steps=0)


def _carry_out(recipe: Recipe, **settings: Any) -> GPT2LMHeadModel:
    from circuitlab.zoo import summing, training

    if isinstance(recipe, superposition.GatesRecipe):
        return summing.train_gates(recipe, **settings)
    return training.train(recipe, **settings)


def save(module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write a trained model and its tokenizer in Hugging Face layout.

    ``GPT2LMHeadModel.from_pretrained(folder)`` reads it back.

    Raises:
        ModelError: the module has no norms, so a stock GPT-2 could not read it.
        ResourceError: the folder cannot be written.
    """
    from circuitlab.zoo.files import write

    write(module, tokenizer, Path(folder))


def evaluate(
    name: str, module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """How well a module does the task of ``name`` on held-out data: numbers by name.

    All models: ``accuracy``, ``probability-difference``, ``clean-logit-difference`` and
    ``corrupt-logit-difference``; induction also ``previous-token`` and ``induction``, the attention
    of its best heads; gates also ``table-error``, in logits; circles also ``duplicate`` and
    ``rest``, the least attention of the last word to itself earlier on in clean prompts and to
    ``<bos>`` in corrupt ones, and ``precision-limit``, the most words, a power of two, that weights
    and arithmetic of the module's type can tell apart; models of ANDs also ``recall``,
    ``precision`` and ``error``, and with ``linear-`` before them those of the best linear function
    of the inputs, see :func:`circuitlab.zoo.summing.gate_scores`; hand-planted also
    ``table-error``, the largest distance of a feature from its graph's value.

    Raises:
        ModelError: there is no such model.
    """
    _entry(name)
    from circuitlab.zoo import compiling, summing, training

    task = next(task for task in _TASKS if task.name == name)
    recipe = _RECIPES.get(name)
    pairs = recipe.pairs(N_EVALUATION, seed="evaluation") if recipe else task.pairs
    metrics = training.evaluate(module, tokenizer, pairs)
    if name == "induction":
        metrics |= training.induction_scores(module, tokenizer, pairs[:128])
    if name in hand.GATES:
        metrics["table-error"] = compiling.gate_error(hand.GATES[name], module, tokenizer)
    if name in circle.CIRCLES:
        metrics |= compiling.circle_scores(module, tokenizer, pairs)
    if name in superposition.GATED_PAIRS:
        metrics |= summing.gate_scores(name, module, tokenizer)
    if name == "hand-planted":
        metrics["table-error"] = summing.planted_error(module, tokenizer)
    return metrics


def known_edges(
    name: str, *, sense: Literal["mechanism", "effective"] = "mechanism"
) -> frozenset[tuple[str, str, str]]:
    """The true circuit of a hand-made model, as (source, target, port).

    Args:
        name: Of a hand-made model, see :data:`MODELS`.
        sense: ``mechanism``: with zero in all other edges no answer to any prompt changes, and with
            zero in any one of these some answer does. ``effective``: those of them that change the
            task's metric on some pair when they alone carry what the corrupt prompt writes; what an
            exact edge-patching analysis of the clean run finds.

    Raises:
        ModelError: there is no such model, or it was trained and nobody knows.
    """
    if _entry(name).kind == "trained":
        raise ModelError(
            f"model {name!r} was trained, so its true circuit is not known; "
            f"known are those of {', '.join(_MECHANISMS)}"
        )
    return (_MECHANISMS if sense == "mechanism" else _EFFECTIVE)[name]


def _entry(name: str) -> BundledModel:
    try:
        return MODELS[name]
    except KeyError:
        close = get_close_matches(name, MODELS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ModelError(
            f"bundled model {name!r} does not exist; {hint}There are {', '.join(MODELS)}"
        ) from None


def _recipe(name: str, fact: str) -> Recipe:
    if _entry(name).kind == "hand":
        raise ModelError(f"model {name!r} {fact}")
    return _RECIPES[name]
