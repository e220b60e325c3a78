"""Refining: a walk's steps in order, and where the next one tells most."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from circuitlab import Site
from circuitlab_activation_plateaus.walks.responses import speed

#: No interval is halved to less than this: of a path from 0 to 1 it leaves rounding to see.
SHORTEST = 1e-3


class Grid:
    """Walks that are being refined: all steps so far, and how fast the output moves between them.

    The next step goes into the middle of the interval with the largest ∫v², speed squared times
    length. At a jump this grows as the interval shrinks, so bisection goes on until nothing shorter
    is allowed; where the speed is even so are the steps; and a long interval with a jump somewhere
    in it is not passed over for a short one that is a little faster.

    Attributes:
        t: Places of the steps in order, ``[n_rows, n]``, float64.
    """

    def __init__(self, t: Tensor, parts: Mapping[str | Site, Tensor], refine: int) -> None:
        """Begin with some steps.

        Args:
            t: Their places in order, ``[n_rows, n_steps]``.
            parts: What is kept of each, ``[n_rows, n_steps, width]``; the speed is that of
                ``parts["logits"]``.
            refine: How many steps will be added.
        """
        n_rows, n_steps = t.shape
        self.t = t
        self._rows = torch.arange(n_rows, device=t.device)[:, None]
        # In the order in which they were taken; the columns have them in order of t.
        self._kept = {
            name: value.new_empty(n_rows, n_steps + refine, value.shape[2])
            for name, value in parts.items()
        }
        self._put(parts, 0)
        self._columns = torch.arange(n_steps, device=t.device).expand(n_rows, -1)
        # Of the interval that begins at each step.
        self._speeds = pad(speed(t, parts["logits"]), (0, 1))

    def next(self) -> Tensor:
        """Where the next step of each walk belongs, ``[n_rows, 1]``."""
        at = self._chosen()
        return (self.t.gather(1, at) + self.t.gather(1, at + 1)) / 2

    def add(self, middle: Tensor, parts: Mapping[str | Site, Tensor]) -> None:
        """Take in one more step of each walk, ``[n_rows, 1]``, at :meth:`next`."""
        at, new = self._chosen(), self.t.shape[1]
        self._put(parts, new)
        columns = torch.cat([self._columns, torch.full_like(at, new)], 1)
        three = torch.cat([at, torch.full_like(at, new), at + 1], 1)
        t = torch.cat([self.t, middle], 1)
        values = self._kept["logits"][self._rows, columns.gather(1, three)]
        near = speed(t.gather(1, three), values)
        speeds = torch.cat([self._speeds.scatter(1, at, near[:, :1]), near[:, 1:]], 1)
        self.t, order = t.sort(1)
        self._columns, self._speeds = columns.gather(1, order), speeds.gather(1, order)

    def parts(self) -> dict[str | Site, Tensor]:
        """What is kept of the steps, in order of t."""
        return {name: value[self._rows, self._columns] for name, value in self._kept.items()}

    def _chosen(self) -> Tensor:
        """Which interval of each walk is halved next, in order of t, ``[n_rows, 1]``."""
        lengths = pad(self.t.diff(dim=1), (0, 1))
        changes = torch.where(lengths >= 2 * SHORTEST, self._speeds**2 * lengths, -1)
        return changes.argmax(1, keepdim=True)

    def _put(self, parts: Mapping[str | Site, Tensor], first: int) -> None:
        for name, value in parts.items():
            self._kept[name][:, first : first + value.shape[1]] = value
