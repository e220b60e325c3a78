"""Slices: a plane through the activations of three prompts, coloured by whose output it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitlab import Image, OptionError, Point, Site
from circuitlab_activation_plateaus.walks.paths import plane
from circuitlab_activation_plateaus.walks.walking import walk

if TYPE_CHECKING:
    from circuitlab import Tokens, TracedModel

#: Both coordinates run from here to there (Janiak et al. 2024).
LOW, HIGH = -0.25, 1.25


@dataclass(frozen=True, eq=False)
class Slice:
    """Outputs over a plane.

    Attributes:
        alpha: First coordinates, ``[n]``.
        beta: Second coordinates, ``[n]``.
        similarity: To the outputs of A, B and C, 0 to 1, ``[n_beta, n_alpha, 3]``.
        corners: Coordinates of A, B and C, ``[3, 2]``.
    """

    alpha: Tensor
    beta: Tensor
    similarity: Tensor
    corners: Tensor

    def panel(self, labels: Sequence[str], site: Site) -> Image:
        """The slice as an image; a corner that lies outside is not marked.

        Args:
            labels: What A, B and C are called.
            site: Where the activations stand.
        """
        named = list(zip("ABC", labels, self.corners.tolist(), strict=True))
        marks = [
            Point(name=f"{letter} {label}", x=x, y=y)
            for letter, label, (x, y) in named
            if LOW <= x <= HIGH and LOW <= y <= HIGH
        ]
        outside = [letter for letter, _, (x, y) in named if not (LOW <= x <= HIGH)]
        caption = (
            f"{site} on the plane through three prompts' activations, in A's context. Colour: how "
            f"near the last stream is to what each gives there; black: far from all."
        )
        caption += f" {', '.join(outside)} lies outside." if outside else ""
        return Image(
            title="Slice through three activations",
            x=self.alpha.tolist(),
            y=self.beta.tolist(),
            pixels=_rounded(self.similarity),
            x_label="α, from A to B",
            y_label="β, towards C",
            channels=[f"as {letter} {label}" for letter, label, _ in named],
            points=marks,
            caption=caption,
        )


def slice_plane(
    model: TracedModel,
    tokens: Tokens,
    site: Site,
    corners: Tensor,
    *,
    steps: int = 31,
    batch_size: int | None = None,
) -> Slice:
    """Outputs over the plane ``A + α (B - A) + β (C - P)``, P the nearest point to C on AB.

    The slice of Janiak et al. (2024, arXiv:2409.17113), α and β from -0.25 to 1.25, all in the
    context of A. The output is the last residual stream at the last position. The similarity to a
    corner's output is 1 less the distance from it over that of the nearest other corner, at least
    0: so a corner has its own colour alone.

    Args:
        model: Any traced model.
        tokens: Prompt A, one row.
        site: Where the activations stand; a residual stream before the last.
        corners: Activations A, B and C at the last position, ``[3, d]``.
        steps: Points along each axis.
        batch_size: Points per pass; None chooses.

    Raises:
        OptionError: fewer than 2 steps, or two corners give the same output, or C lies on AB.
    """
    if steps < 2:
        raise OptionError(f"--slice-steps {steps} makes no plane; give 2 or more")
    a, b, c = corners
    axis = torch.linspace(LOW, HIGH, steps, dtype=torch.float64, device=corners.device)
    beta, alpha = torch.meshgrid(axis, axis, indexing="ij")
    foot = float(_along(c, a, b))
    places = torch.tensor([[0.0, 0.0], [1.0, 0.0], [foot, 1.0]], dtype=torch.float64)
    grid = plane(a, b, c, alpha.flatten(), beta.flatten())
    out = Site("resid_post", model.n_layers - 1)
    points = torch.cat([grid, corners])[None]
    walks = walk(model, tokens, site, points, read=[out], batch_size=batch_size, logits=False)
    found = walks.read[out][0].double()
    outputs, ends = found[:-3], found[-3:]
    apart = (ends[:, None] - ends).norm(dim=-1) + torch.diag(ends.new_full((3,), torch.inf))
    nearest = apart.amin(1)
    if not bool((nearest > 1e-6 * ends.norm(dim=-1).max()).all()):
        raise OptionError(
            "two of its three prompts give the same output; take another pair (--slice-pair), or "
            "none (--slice-pair 0)"
        )
    distances = (outputs[:, None] - ends).norm(dim=-1)
    similarity = (1 - distances / nearest).clamp(0, 1)
    return Slice(axis, axis, similarity.view(steps, steps, 3), places)


def third_corner(activations: Tensor, outputs: Tensor, first: int, second: int) -> int:
    """The prompt whose output is furthest from the nearer one of two others' outputs.

    Of prompts that lie on the slice; of all, where none of them does or gives another output.

    Args:
        activations: ``[n, d]``.
        outputs: ``[n, vocab]``.
        first: Row of A.
        second: Row of B.
    """
    distances = torch.cdist(outputs.double(), outputs[[first, second]].double()).amin(1)
    inside = _along(activations, activations[first], activations[second])
    on_slice = torch.where((inside >= LOW) & (inside <= HIGH), distances, 0.0)
    return int((on_slice if bool(on_slice.any()) else distances).argmax())


def _along(points: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """First coordinate of points ``[n, d]`` on the plane, ``[n]``: 0 at A and 1 at B."""
    side = (b - a).double()
    return ((points - a).double() @ side) / (side @ side).clamp(min=1e-300)


def _rounded(similarity: Tensor) -> list[list[list[float]]]:
    return [[[round(part, 3) for part in pixel] for pixel in row] for row in similarity.tolist()]
