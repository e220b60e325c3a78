"""TrainSettings: everything that the numbers of a training depend on, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from circuitlab import OptionError
from circuitlab_feature_interactions.steering import Steering

Arch = Literal["topk", "relu", "jumprelu", "gated"]
InteractionKind = Literal["none", "l1", "l1l2", "hoyer", "log", "group"]

#: Weight of the sparsity term at the beginning, where none is given.
SPARSITY = {"topk": 0.0, "relu": 0.1, "jumprelu": 0.006, "gated": 0.25}
_SAMPLED = re.compile(r"(rows|tokens):([1-9]\d{0,8})")
#: Of all steps: until the learning rate is full, from when on it falls, and until when the weight
#: of the sparsity term is steered.
RISE, FALL, STEERED = 0.01, 0.8, 0.95


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How dictionaries are trained; see ``dict train`` for what each setting does.

    Attributes:
        sites: Pairs, as :func:`circuitlab_feature_interactions.sites.site_pairs` reads them.
        arch: What makes latents sparse.
        k: Active latents at a token: exactly for ``topk``, about for others.
        expansion: Latents per number that is read.
        interaction: What of the interactions is made small.
        strength: Its weight against the reconstruction losses, in the unit of
            :func:`penalties.unit_of`, which is per active target latent.
        estimator: ``exact``; or, without bias, ``rows:N`` from N target latents of each token,
            ``tokens:N`` from N tokens of each step, ``rows:N,tokens:N`` from both, at random.
        warmup: Share of the steps until the interaction's weight is full.
        steps: Number of steps.
        batch_tokens: Tokens of a step.
        learning_rate: Of Adam; None: ``2e-4 * sqrt(2**14 / n)`` with ``n`` latents, at most 0.002.
        sparsity: Weight of the sparsity term; None: moved until about ``k`` latents are active.
        data: File of texts; None for the model's corpus.
        context_length: Most tokens of a prompt; None for the model's most.
        checkpoint_every: Steps from one checkpoint to the next.
        seed: For all that is drawn at random.

    Raises:
        OptionError: a value is out of range; it is named.
    """

    sites: str = "mlp.0"
    arch: Arch = "topk"
    k: int = 8
    expansion: float = 4.0
    interaction: InteractionKind = "l1"
    strength: float = 0.024
    estimator: str = "tokens:64"
    warmup: float = 0.05
    steps: int = 1500
    batch_tokens: int = 512
    learning_rate: float | None = None
    sparsity: float | None = None
    data: Path | None = None
    context_length: int | None = None
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in (("arch", Arch), ("interaction", InteractionKind)):
            if (value := getattr(self, name)) not in get_args(words):
                known = ", ".join(get_args(words))
                raise OptionError(f"{name} {value!r} is unknown; use {known}")
        for name in ("k", "steps", "batch_tokens", "checkpoint_every"):
            if (value := getattr(self, name)) < 1:
                raise OptionError(f"{name} is {value}; give 1 or more")
        self._check_number("expansion", self.expansion > 0, "above 0")
        self._check_number("strength", self.strength >= 0, "0 or more")
        self._check_number("warmup", 0 <= self.warmup <= 1, "from 0 to 1")
        rate, sparsity = self.learning_rate, self.sparsity
        self._check_number("learning_rate", rate is None or rate > 0, "above 0")
        self._check_number("sparsity", sparsity is None or sparsity >= 0, "0 or more")
        if self.arch == "topk" and sparsity:
            raise OptionError("topk has no sparsity term: k sets what is active; leave it out")
        self._sampled  # noqa: B018  # refuses an unknown estimator

    def _check_number(self, name: str, fits: bool, wanted: str) -> None:
        value = getattr(self, name)
        if not fits or (value is not None and not math.isfinite(value)):
            raise OptionError(f"{name} is {value}; give a number {wanted}")

    @property
    def rows(self) -> int | None:
        """Target latents of each token that are drawn for the interactions; None for all."""
        return self._sampled.get("rows")

    @property
    def tokens(self) -> int | None:
        """Tokens of each step that are drawn for the interactions; None for all."""
        return self._sampled.get("tokens")

    @property
    def _sampled(self) -> dict[str, int]:
        """What the estimator draws.

        Raises:
            OptionError: it is unknown.
        """
        if self.estimator == "exact":
            return {}
        parts = [_SAMPLED.fullmatch(part.strip()) for part in self.estimator.split(",")]
        found = {part[1]: int(part[2]) for part in parts if part}
        if len(found) < len(parts):
            raise OptionError(
                f"estimator {self.estimator!r} is unknown; use exact, rows:N, tokens:N, or "
                f"rows:N,tokens:N"
            )
        return found

    @property
    def penalised(self) -> bool:
        """Whether interactions weigh anything."""
        return self.interaction != "none" and self.strength > 0

    def steering(self) -> Steering:
        """The weight of a dictionary's sparsity term at the beginning."""
        if self.sparsity is not None:
            return Steering(self.sparsity, None)
        start = SPARSITY[self.arch]
        least = -start if self.arch == "jumprelu" else 0.0
        return Steering(start, None if self.arch == "topk" else self.k, self.steps, least)

    def n_latents(self, width: int) -> int:
        """Latents of a dictionary of a site of this width.

        Raises:
            OptionError: there would be none, or fewer than ``k``.
        """
        n = round(self.expansion * width)
        if n < 1 or (self.arch == "topk" and self.k > n):
            most = "none" if n < 1 else f"{n}, fewer than k = {self.k}"
            raise OptionError(
                f"expansion {self.expansion:g} of a site of {width} numbers gives {most} latents; "
                f"give a larger expansion or a smaller k"
            )
        return n

    def rate_of(self, n: int) -> float:
        """Adam's learning rate for a dictionary of ``n`` latents.

        Its default falls with the square root of ``n``, as Gao et al. 2024 (arXiv:2406.04093) found
        to be best.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return float(min(2e-3, 2e-4 * math.sqrt(2**14 / n)))

    def rate_share(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0: a rise, a plateau, a fall to 0."""
        rise = max(1.0, RISE * self.steps)
        fall = max(1.0, (1 - FALL) * self.steps)
        return min(1.0, (step + 1) / rise, (self.steps - step) / fall)

    def weight_at(self, step: int) -> float:
        """Weight of the interactions at a step, counted from 0."""
        rise = self.warmup * self.steps
        return self.strength * (min(1.0, step / rise) if rise else 1.0)

    def to_json(self) -> dict[str, Any]:
        """All settings as plain JSON; of the data only the name."""
        values = asdict(self)
        return values | {"data": None if self.data is None else self.data.name}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Every fact that differs, with both values."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in names)
