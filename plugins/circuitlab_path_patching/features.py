"""Features: something read off a run, one number per prompt, in place of the task's metric."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from circuitlab import OptionError, Site, SiteError
from circuitlab_path_patching.directions import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, Run, TracedModel

_SITE = re.compile(r"(?P<kind>[a-z_]+)(\.(?P<layer>\d+))?(\.h(?P<head>\d+))?(\[(?P<pos>-?\d+)\])?")


@dataclass(frozen=True, slots=True)
class Feature:
    """One number per prompt, read off a run.

    Attributes:
        name: What it is, for people; also the name of its component in a circuit.
        sites: What a run must read for it.
        value: From such a run to ``[batch]``.
        position: The last position it looks at, counted from the end, below 0. Prompts are padded
            on the left, so it is the same token of a prompt in every batch.
    """

    name: str
    sites: tuple[Site, ...]
    value: Callable[[Run], Tensor]
    position: int = -1


def parse_site(text: str) -> Site:
    """The site that ``str(site)`` writes, as ``resid_post.1[-1]`` or ``z.1.h0[-1]``.

    Raises:
        OptionError: the text has another form, or names a site that cannot be.
    """
    found = _SITE.fullmatch(text.strip())
    if found is None:
        raise OptionError(
            f"site {text!r} cannot be read; write KIND.LAYER[POSITION] or "
            f"KIND.LAYER.hHEAD[POSITION], as resid_post.1[-1] or z.1.h0[-1]"
        )
    numbers = (found[part] for part in ("layer", "head", "pos"))
    try:
        return Site(found["kind"], *(None if n is None else int(n) for n in numbers))
    except SiteError as error:
        raise OptionError(f"site {text!r}: {error}") from error


def read_feature(
    text: str, direction: Path | None, model: TracedModel, pairs: EncodedTask
) -> Feature:
    """The dot product of a site and a direction, which is used as it is, whatever its length.

    Args:
        text: The site, with one position and, where it has heads, one head.
        direction: A safetensors file of one vector as wide as the site.
        model: What it is read from.
        pairs: The task. A position from the start is only clear where all prompts are equally long.

    Raises:
        OptionError: the site is no single vector, there is no direction, or it does not fit.
        SiteError: the model has no such site.
    """
    site = parse_site(text)
    if site.kind in ("pattern", "logits"):
        raise OptionError(
            f"feature {text!r}: a direction needs a site that holds vectors, which {site.kind} "
            f"does not; give resid_post, mlp_out, z, … or leave --feature out for the metric"
        )
    if len(site.shape.split(", ")) == 4 and site.head is None:
        raise OptionError(
            f"feature {text!r} is {model.n_heads} heads; name one, as {site.kind}.{site.layer}.h0"
        )
    if direction is None:
        raise OptionError(
            f"feature {text!r} is a vector, not a number; give the direction to project it on: "
            f"--direction FILE, safetensors with one vector"
        )
    site = Site(site.kind, site.layer, site.head, from_the_end(site, text, pairs))
    width = model.d_head if site.head is not None else model.d_model
    vector = _read_direction(direction, width, site).to(model.device)

    def value(run: Run) -> Tensor:
        return run[site].double() @ vector

    assert site.position is not None
    return Feature(str(site), (site,), value, site.position)


def from_the_end(site: Site, text: str, pairs: EncodedTask) -> int:
    """The site's position, counted from the end; there in every prompt, clean and corrupt."""
    lengths = sorted({int(n) for part in (pairs.clean, pairs.corrupt) for n in part.mask.sum(-1)})
    if site.position is None:
        raise OptionError(f"feature {text!r} names no position; write {text}[-1] for the last one")
    if site.position >= 0 and len(lengths) > 1:
        raise OptionError(
            f"feature {text!r}: prompts of {lengths[0]} to {lengths[-1]} tokens have no common "
            f"start; count the position from the end, as [-1]"
        )
    position = site.position - lengths[0] if site.position >= 0 else site.position
    if not -lengths[0] <= position < 0:
        raise OptionError(
            f"feature {text!r}: the shortest prompt has {lengths[0]} tokens; "
            f"give a position from {-lengths[0]} to -1"
        )
    return position


def _read_direction(path: Path, width: int, site: Site) -> Tensor:
    """The one vector of a safetensors file, float64."""
    needed = f"site {site} needs one vector of {width} numbers"
    vector = read_tensor(path, width, (1,), needed, "a safetensors file")
    if not vector.isfinite().all() or not vector.any():
        fact = "NaN or infinity" if vector.any() else "only zeros"
        raise OptionError(
            f"direction {str(path)!r} holds {fact}; give finite numbers that are not all 0"
        )
    return vector
