"""Metrics: one number per prompt that says how much the model does the task. Higher = more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitlab.errors import TaskError


@dataclass(frozen=True, slots=True)
class Answers:
    """Token ids of the right and wrong answers, padded with -1.

    Attributes:
        right: ``[batch, n]``.
        wrong: ``[batch, m]``; ``m`` may be 0.
    """

    right: Tensor
    wrong: Tensor


@dataclass(frozen=True, slots=True)
class Metric:
    """A differentiable function of the logits after the last token.

    Attributes:
        name: Kebab-case.
        function: ``(logits [batch, vocab], answers, reference logits [batch, vocab]) -> [batch]``.
            The reference is what the clean prompt gives; only some metrics look at it.
        description: What it measures and its unit, in a few words.
        needs_wrong: Whether every pair must name a wrong answer.
        answers_only: Whether it looks at no logits but those of right and wrong answers.
    """

    name: str
    function: Callable[[Tensor, Answers, Tensor], Tensor]
    description: str
    needs_wrong: bool = False
    answers_only: bool = False

    def __call__(self, logits: Tensor, answers: Answers, reference: Tensor) -> Tensor:
        """The metric of each prompt, ``[batch]``, in at least float32."""
        return self.function(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), answers, reference
        )


def logit_difference(logits: Tensor, answers: Answers, reference: Tensor) -> Tensor:
    """Mean logit of the right answers minus mean logit of the wrong ones, ``[batch]``, in logits.

    Wang et al. 2022 (arXiv:2211.00593); with several answers, the average as in auto-circuit.
    """
    return _mean_at(logits, answers.right) - _mean_at(logits, answers.wrong)


def answer_log_prob(logits: Tensor, answers: Answers, reference: Tensor) -> Tensor:
    """Log-probability that the next token is any of the right answers, ``[batch]``, in nats."""
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, answers.right.clamp(min=0))
    return chosen.masked_fill(answers.right < 0, -torch.inf).logsumexp(-1)


def kl_divergence(logits: Tensor, answers: Answers, reference: Tensor) -> Tensor:
    """Minus KL(clean ‖ patched) of the next-token distributions, ``[batch]``, in nats.

    0 where the run predicts what the clean run predicts, negative elsewhere. Its gradient at the
    clean run is zero, so a gradient taken there says nothing: use ``eap-ig`` with it.
    """
    reference_log_probs = reference.to(logits.dtype).log_softmax(-1)
    return (reference_log_probs.exp() * (logits.log_softmax(-1) - reference_log_probs)).sum(-1)


def _mean_at(logits: Tensor, ids: Tensor) -> Tensor:
    valid = ids >= 0
    chosen = logits.gather(-1, ids.clamp(min=0)) * valid
    return chosen.sum(-1) / valid.sum(-1).clamp(min=1)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "logit-difference",
            logit_difference,
            "right minus wrong answer, logits",
            needs_wrong=True,
            answers_only=True,
        ),
        Metric("answer-log-prob", answer_log_prob, "log-probability of the answer, nats"),
        Metric("kl-divergence", kl_divergence, "minus KL(clean ‖ run), nats"),
    )
}


def find_metric(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        TaskError: there is none; the message lists those there are.
    """
    try:
        return METRICS[name]
    except KeyError:
        raise TaskError(
            f"metric {name!r} does not exist; metrics are {', '.join(METRICS)}"
        ) from None
