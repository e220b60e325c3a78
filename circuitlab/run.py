"""Run: what one forward pass, and perhaps a backward one, returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from circuitlab.errors import SiteError
from circuitlab.plans import Locator, Place
from circuitlab.prompts import Tokens
from circuitlab.sites import Site


class Run:
    """What one forward pass returned.

    ``run[site]`` is the value at a site that was read, ``run.gradient(site)`` the gradient at one
    that was tapped; both detached, in the shape :class:`Site` states.

    Attributes:
        logits: ``[batch, pos, vocab]``; ``pos`` is 1, the last, unless all were asked for.
        tokens: The prompts as they were run.
    """

    def __init__(
        self,
        tokens: Tokens,
        logits: Tensor,
        values: Mapping[Place, Tensor],
        gradients: Mapping[Place, Tensor],
        locator: Locator,
    ) -> None:
        self.tokens = tokens
        self.logits = logits
        self._values, self._gradients, self._locator = values, gradients, locator

    @property
    def mask(self) -> Tensor:
        """``[batch, pos]``, True where a token is real."""
        return self.tokens.mask

    def __getitem__(self, site: Site) -> Tensor:
        """The value at a site.

        Raises:
            SiteError: the site was not read.
        """
        return self._locator.view(site, self._find(site, self._values, "read"))

    def gradient(self, site: Site) -> Tensor:
        """Gradient of the summed function at a site, same shape as the site.

        Raises:
            SiteError: the site was not among ``gradient_at``.
        """
        return self._locator.view(site, self._find(site, self._gradients, "gradient_at"))

    def _find(self, site: Site, kept: Mapping[Place, Tensor], option: str) -> Tensor:
        place = self._locator.place(site)
        if place not in kept:
            raise SiteError(f"site {site} was not kept; name it in run(..., {option}=[...])")
        return kept[place]


class AwaitedRun(Run):
    """A run on a host, waited for when it is first looked at.

    Whatever is wrong with it is raised then.
    """

    def __init__(self, tokens: Tokens, locator: Locator, outcome: Callable[[], Run]) -> None:
        self.tokens = tokens
        self._locator = locator
        self._outcome = outcome

    def __getattr__(self, name: str) -> Any:
        if name not in ("logits", "_values", "_gradients"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__dict__.update(vars(self._outcome()))
        del self._outcome
        return self.__dict__[name]
