"""Training: carry out a recipe, and measure what came of it on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from circuitlab.tasks import PromptPair
from circuitlab.zoo.network import finished, gpt2, parameters
from circuitlab.zoo.recipe import BOS, Example, Recipe, split

Progress = Callable[[int, int, dict[str, float]], None]
Keep = Callable[[int, GPT2LMHeadModel], None]

#: Steps between two reports of progress.
REPORT_EVERY = 20
_WARM_UP = 100


def train(
    recipe: Recipe,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
    keep_every: int = 1,
) -> GPT2LMHeadModel:
    """The model a recipe gives, in eval mode, its parameters frozen.

    The same seed gives the same weights on the same machine: one thread is used, and the caller's
    random state is left alone. The rate rises for 100 steps and falls to zero over the second half.

    Args:
        recipe: What to train on what.
        seed: Of weights and data.
        steps: Optimiser steps; those of the recipe if None.
        progress: Called with step, total and ``{"loss": nats}`` every 20 steps and at the end.
        keep: Called with the number of steps done and the module as it is then: before the first
            step, every ``keep_every`` steps, and at the end.
        keep_every: Steps between two of these calls.
    """
    total = recipe.steps if steps is None else steps
    rng = Random(f"{recipe.name} {seed}")  # noqa: S311  # data, not secrets
    ids = {word: index for index, word in enumerate(recipe.vocabulary)}
    with repeatable(seed):
        module = build(recipe)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.99),
        )
        for step in range(1, total + 1):
            if keep is not None and (step - 1) % keep_every == 0:
                keep(step - 1, module)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate_share(step, total)
            loss = question_loss(
                module, [recipe.example(rng) for _ in range(recipe.batch_size)], ids
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
            if progress is not None and (step % REPORT_EVERY == 0 or step == total):
                progress(step, total, {"loss": loss.item()})
    finished(module)
    if keep is not None:
        keep(total, module)
    return module


def rate_share(step: int, total: int) -> float:
    """Share of the learning rate at a step, counted from 1: a rise, a plateau, a fall to 0."""
    return min(1.0, step / _WARM_UP, 2 * (1 - step / (total + 1)))


def build(recipe: Recipe) -> GPT2LMHeadModel:
    """An untrained GPT-2 of the recipe's shape, drawn from torch's global random state."""
    module = gpt2(
        len(recipe.vocabulary),
        recipe.n_positions,
        n_layers=recipe.n_layers,
        n_heads=recipe.n_heads,
        d_model=recipe.d_model,
        n_inner=recipe.n_inner,
        weight_std=recipe.weight_std,
    )
    for embedding in (module.transformer.wpe, module.transformer.wte):
        torch.nn.init.normal_(embedding.weight, std=recipe.embedding_std)
    if recipe.attention_only:
        for name, weight in parameters(module).items():
            if ".mlp." in name:
                torch.nn.init.zeros_(weight.requires_grad_(False))
    return module


def question_loss(
    module: GPT2LMHeadModel, examples: Sequence[Example], ids: dict[str, int]
) -> Tensor:
    """Mean KL divergence of the answers' distribution from the model's, in nats."""
    rows = [[ids[BOS], *(ids[word] for word in split(example.text))] for example in examples]
    width = max(map(len, rows))
    # What fills up a row stands on the right, where no earlier position can see it.
    tokens = torch.tensor([row + [ids[BOS]] * (width - len(row)) for row in rows])
    asked = [
        (index, question.position % len(rows[index]), question.answers)
        for index, example in enumerate(examples)
        for question in example.questions
    ]
    wanted = torch.zeros(len(asked), len(ids))
    place, answer, weight = zip(
        *(
            (i, ids[word], 1 / len(words))
            for i, (_, _, words) in enumerate(asked)
            for word in words
        ),
        strict=True,
    )
    wanted[list(place), list(answer)] = torch.tensor(weight)
    logits = module(tokens).logits[[index for index, _, _ in asked], [at for _, at, _ in asked]]
    return torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")


@torch.no_grad()
def evaluate(
    module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[PromptPair]
) -> dict[str, float]:
    """How well a model answers prompts: numbers by name.

    ``accuracy``: share of clean prompts whose likeliest next token is a right answer.
    ``probability-difference``: right minus wrong answers' probability on clean prompts, mean.
    ``clean-logit-difference``, ``corrupt-logit-difference``: mean logit of the right answers minus
    that of the wrong ones, mean over prompts.
    """
    right = _membership(tokenizer, [pair.answers for pair in pairs])
    wrong = _membership(tokenizer, [pair.wrong_answers for pair in pairs])
    clean = last_logits(module, tokenizer, [str(pair.clean) for pair in pairs])
    corrupt = last_logits(module, tokenizer, [str(pair.corrupt) for pair in pairs])
    contrast = right / right.sum(-1, keepdim=True) - wrong / wrong.sum(-1, keepdim=True)
    best = right.gather(-1, clean.argmax(-1, keepdim=True))
    return {
        "accuracy": best.mean().item(),
        "probability-difference": (clean.softmax(-1) * (right - wrong)).sum(-1).mean().item(),
        "clean-logit-difference": (clean * contrast).sum(-1).mean().item(),
        "corrupt-logit-difference": (corrupt * contrast).sum(-1).mean().item(),
    }


@torch.no_grad()
def last_logits(
    module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> Tensor:
    """Logits after the last token of each prompt, ``[batch, vocab]``."""
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = module(batch["input_ids"], attention_mask=mask, position_ids=positions).logits
    return logits[:, -1]


@torch.no_grad()
def induction_scores(
    module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[PromptPair]
) -> dict[str, float]:
    """Attention of the best previous-token head and of the best induction head, by name.

    ``previous-token``: attention to the token before, mean over positions. ``induction``: attention
    of the last token to what followed its first occurrence, mean over prompts. Olsson et al. 2022
    (arXiv:2209.11895).
    """
    before, after = [], []
    for pair in pairs:
        words = [BOS, *split(str(pair.clean))]
        ids = tokenizer(str(pair.clean), return_tensors="pt")["input_ids"]
        patterns = torch.stack(module(ids, output_attentions=True).attentions)[:, 0]
        before.append(patterns.diagonal(-1, 2, 3).mean(-1))
        after.append(patterns[:, :, -1, words.index(words[-1]) + 1])
    return {
        "previous-token": torch.stack(before).mean(0).max().item(),
        "induction": torch.stack(after).mean(0).max().item(),
    }


def _membership(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[Sequence[str | int]]
) -> Tensor:
    member = torch.zeros(len(answers), len(tokenizer))
    for row, words in enumerate(answers):
        member[row, tokenizer.convert_tokens_to_ids([str(word) for word in words])] = 1
    return member


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Seeds torch's global random state, with one thread; afterwards both are as before."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(n_threads)
