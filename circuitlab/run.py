"""Run: what one forward pass, and perhaps a backward one, returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from circuitlab.errors import ModelError, SiteError
from circuitlab.labels import counted
from circuitlab.notebook import Shown, html_table
from circuitlab.plans import Locator, Place
from circuitlab.prompts import Tokens
from circuitlab.sites import BLOCK_KINDS, Site


class Run(Shown):
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

    def _sites(self) -> tuple[Site, ...]:
        """Sites whose values are here, in the order they run."""
        if not self._values:
            return ()
        architecture = self._locator.architecture
        layers = [[Site("embed")]] + [
            [Site(kind, layer) for kind in BLOCK_KINDS] for layer in range(architecture.n_layers)
        ]
        return tuple(site for some in layers for site in some if self._has(site))

    def _has(self, site: Site) -> bool:
        try:
            return self._locator.place(site) in self._values
        except (SiteError, ModelError):  # not of this model
            return False

    def _shown(self) -> tuple[str, str]:
        values = {str(site): self[site] for site in self._sites()}
        rows = [(name, tuple(value.shape), value.dtype) for name, value in values.items()]
        rows.append(("logits", tuple(self.logits.shape), self.logits.dtype))
        text = f"Run of {counted(len(self.tokens), 'prompt')}: {', '.join(row[0] for row in rows)}"
        return text, html_table(("site", "shape", "type"), rows, caption=text)

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

    def _shown(self) -> tuple[str, str]:
        if "_outcome" in vars(self):  # showing it is no reason to wait
            text = f"Run of {counted(len(self.tokens), 'prompt')} on a host, not looked at yet"
            return text, html_table((), [(text,)])
        return super()._shown()

    def __getattr__(self, name: str) -> Any:
        if name not in ("logits", "_values", "_gradients"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__dict__.update(vars(self._outcome()))
        del self._outcome
        return self.__dict__[name]
