"""ActivationSource: a model's activations in batches, as a training needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab import NumericsError, OptionError, Site
from circuitlab_feature_interactions.data import PromptStream, generator_of, pad

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Tokens, padding included, that go through the model at a time.
_PASS = 8192
#: Batches that are shuffled together.
MIXED = 8


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Activations of some tokens; shuffled ``[n]``, or whole prompts ``[batch, pos]``.

    Attributes:
        values: At each site ``[n, width]``, or ``[batch, pos, width]``; at least float32, and 0
            where padded.
        tokens: Ids, ``[n]`` or ``[batch, pos]``; 0 where padded.
        positions: Where each token stands in its prompt, same shape; 0 where padded.
        rows: Number of each token's prompt in the stream, same shape.
        mask: True where a token is real, same shape; all of them when shuffled.
    """

    values: dict[Site, Tensor]
    tokens: Tensor
    positions: Tensor
    rows: Tensor
    mask: Tensor

    @property
    def n_tokens(self) -> int:
        """Number of real tokens."""
        return int(self.mask.sum())

    def flat(self, site: Site) -> Tensor:
        """The site's values at real tokens, ``[n, width]``."""
        return self.values[site][self.mask]


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the stream of batches one stands: all that a later process needs to go on.

    Attributes:
        prompt: First prompt of the mix that the next batch is from.
        batch: Number of that batch in the mix.
    """

    prompt: int = 0
    batch: int = 0


class ActivationSource:
    """Batches of activations, made as they are asked for.

    Shuffled tokens come from mixes of a few batches: enough prompts are run, their tokens are put
    in random order, and what does not fill a batch is left out. Nothing else is kept. The same
    stream, seed and sizes give the same batches, from any :class:`Place` on.

    Args:
        model: Whose activations.
        stream: Prompts.
        sites: What to read.
        n_tokens: Tokens of a batch; of whole prompts, at least so many.
        whole: Whole prompts instead of shuffled tokens.
        seed: For the order of tokens.

    Raises:
        OptionError: ``n_tokens`` is below 1.
    """

    def __init__(
        self,
        model: TracedModel,
        stream: PromptStream,
        sites: Sequence[Site],
        n_tokens: int,
        *,
        whole: bool = False,
        seed: int = 0,
    ) -> None:
        if n_tokens < 1:
            raise OptionError(f"{n_tokens} tokens per step are too few; give 1 or more")
        self.model, self.stream, self.sites = model, stream, tuple(sites)
        self.n_tokens, self.whole, self.seed = n_tokens, whole, seed

    def batches(self, start: Place = Place()) -> Iterator[tuple[Batch, Place]]:  # frozen
        """Batches without end, each with the place of the one after it.

        Raises:
            NumericsError: an activation is not finite.
        """
        prompt, skipped = start.prompt, start.batch
        while True:
            rows = self._rows(prompt, self.n_tokens * (1 if self.whole else MIXED))
            after = Place(prompt + len(rows))
            if self.whole:
                yield self._run(rows, prompt), after
            else:
                mixed = self._mix(rows, prompt)
                for n in range(skipped, len(mixed)):
                    last = n + 1 == len(mixed)
                    yield mixed[n], after if last else Place(prompt, n + 1)
            prompt, skipped = after.prompt, 0

    def _rows(self, first: int, n_tokens: int) -> list[Tensor]:
        """Prompts from the first on, until they have so many tokens."""
        rows: list[Tensor] = []
        while n_tokens > 0:
            rows.append(self.stream[first + len(rows)])
            n_tokens -= len(rows[-1])
        return rows

    def _mix(self, rows: Sequence[Tensor], first: int) -> list[Batch]:
        """The tokens of these prompts in random order, as full batches."""
        longest = max(map(len, rows))
        size = max(1, _PASS // longest)
        runs = [self._run(rows[i : i + size], first + i) for i in range(0, len(rows), size)]
        masks = [run.mask for run in runs]
        total = sum(map(len, rows))
        order = torch.randperm(total, generator=generator_of(self.seed, first))
        order = order[: total - total % self.n_tokens].to(self.model.device)

        def mixed(parts: list[Tensor]) -> Sequence[Tensor]:
            real = [part[mask] for part, mask in zip(parts, masks, strict=True)]
            return torch.split(torch.cat(real)[order], self.n_tokens)

        values = {site: mixed([run.values[site] for run in runs]) for site in self.sites}
        tokens, positions, numbers, real = (
            mixed([getattr(run, name) for run in runs])
            for name in ("tokens", "positions", "rows", "mask")
        )
        return [
            Batch(
                {site: parts[n] for site, parts in values.items()},
                tokens[n],
                positions[n],
                numbers[n],
                real[n],
            )
            for n in range(len(tokens))
        ]

    def _run(self, rows: Sequence[Tensor], first: int) -> Batch:
        """Whole prompts, run at once; ``first`` is the number of the first."""
        tokens = pad(rows, self.model.device)
        run = self.model.run(tokens, read=self.sites, logits="none")
        values = {}
        for site in self.sites:
            value = run[site].to(torch.promote_types(self.model.dtype, torch.float32))
            value = value.flatten(2).masked_fill(~tokens.mask[..., None], 0)
            if not torch.isfinite(value).all():
                raise NumericsError(
                    f"activations at {site} of {self.model.name} hold NaN or infinity; run the "
                    f"model in a wider type (--dtype float32)"
                )
            values[site] = value
        numbers = torch.arange(first, first + len(rows), device=self.model.device)
        return Batch(
            values,
            tokens.ids,
            tokens.position_ids,
            numbers[:, None].expand_as(tokens.ids),
            tokens.mask,
        )
