"""Subspace patching: exchange one direction of a site, and see whether its effect is an illusion.

Only the component along a direction v is patched: x becomes x + (v · (x_other - x)) v. That can
have an effect although the model does not use v: a part of v that no reader sees, but that tells
clean from corrupt, drives a part that readers see, but that is the same in both ("dormant").
Patched alone, neither part does anything. This is the interpretability illusion of Makelov, Lange &
Nanda 2023 (arXiv:2311.17030); it is worst in the hidden layer of an MLP, which is much wider than
what reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from circuitlab import OptionError, Site, choose_batch_size, distinct_rows, mean_intervals
from circuitlab_path_patching.directions import read_subspace, row_space, split
from circuitlab_path_patching.effects import Setting, measure, total_circuit
from circuitlab_path_patching.features import from_the_end, parse_site
from circuitlab_path_patching.measures import effect_text
from circuitlab_path_patching.panels import add_panels
from circuitlab_path_patching.patches import Patch

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, EncodedTask, Mode, Patcher, Task, TracedModel, Wiring
    from circuitlab_path_patching.measures import Modes

#: An effect is an illusion where it is more than this many times that of each part alone, and more
#: than this share of the task's effect.
FACTOR, SHARE = 2.0, 0.1

_SITES = "resid_pre, resid_mid, resid_post, mlp_post, or z of one head"


@dataclass(frozen=True)
class Values:
    """A site in both runs of every pair.

    Attributes:
        site: With all positions.
        clean: ``[n_pairs, pos, width]``, float64.
        corrupt: The same of the corrupt prompts.
        where: Positions that are patched, ``[n_pairs, pos]`` bool; no padding.
        rows: Row of each pair, by its number in the task.
    """

    site: Site
    clean: Tensor
    corrupt: Tensor
    where: Tensor
    rows: dict[int, int]

    @cached_property
    def difference(self) -> Tensor:
        """Corrupt less clean, ``[n_pairs, pos, width]``; 0 where nothing is patched."""
        return torch.where(self.where[..., None], self.corrupt - self.clean, 0.0)

    def change(self, basis: Tensor | None, weight: Tensor | None, patcher: Patcher) -> Tensor:
        """What patching a subspace adds to the stream, ``[batch, pos, d_model]``.

        Args:
            basis: Orthonormal rows, ``[k, width]``; None is all of the site.
            weight: From the site to the stream, ``[width, d_model]``; None where it is the stream.
            patcher: The batch.
        """
        chosen = [self.rows[number] for number in patcher.pairs.numbers]
        moved = self.difference[chosen, -patcher.base.mask.shape[1] :]
        moved = moved if patcher.mode == "noise" else -moved
        moved = moved if basis is None else (moved @ basis.T) @ basis
        return (moved if weight is None else moved @ weight).to(patcher.difference.dtype)


def subspace_patching(
    model: TracedModel,
    task: Task,
    *,
    site: str = "resid_post.0[-1]",
    direction: str | Path = "mean-difference",
    mode: Modes = "both",
    batch_size: int | None = None,
) -> CircuitGraph:
    """Patch a direction or subspace of a site, and the parts of it that readers see and do not see.

    What reads ``z`` of a head is its output projection, ``mlp_post`` the MLP's, the residual stream
    all later heads, MLPs and the unembedding, see :meth:`circuitlab.Weights.reading`. A
    direction is the sum of its *visible* part, in the space that they span, and its *hidden* part,
    orthogonal to it. In the residual stream the hidden part is mostly empty, and may be felt
    through the size that norms divide by.

    Args:
        model: Any traced model.
        task: The task.
        site: Site, in the form ``mlp_post.0[-1]`` or ``z.1.h0``; without a position, all positions.
        direction: ``mean-difference``: of corrupt and clean values over these pairs; ``pca``: first
            principal component of the differences, each taken both ways, so that their mean is 0;
            or a safetensors file of one tensor, ``[width]`` or ``[k, width]``, whose rows span the
            subspace.
        mode: The runs that are patched; see :func:`circuitlab.patchers`.
        batch_size: Pairs per batch; None chooses by memory.

    Returns:
        Nodes for the site as a whole, the ``direction``, and its parts ``visible`` and ``hidden``
        where they are not empty, each with its total effect on ``logits``. All but the site also
        say how they tell the runs apart: ``clean_mean``, ``corrupt_mean``, ``clean_std``,
        ``corrupt_std`` along the part (along the mean difference in it, where it has several
        dimensions) and ``separation``, the distance of the means over the root mean square of the
        deviations, None without any.

        ``graph["subspace"]`` has ``n_dimensions``, ``n_seen`` (dimensions of the site that readers
        see), ``visible_share`` (of the squared length), ``share`` (effect of the direction / of the
        site) and ``illusion``, the modes in which the effect is one: more than :data:`FACTOR` times
        that of each part and more than :data:`SHARE` of the task's effect, 95 % sure by bootstrap
        over distinct pairs.

    Raises:
        OptionError: the site has no readers of its own, or the direction cannot be used.
        SiteError: the model has no such site.
        TaskError: positions of clean and corrupt prompts do not correspond.
        NumericsError: an activation is not finite.
    """
    pairs = model.encode(task)
    place = _place(site, model, pairs)
    setting = Setting(model, pairs, mode, "counterfactual", batch_size, torch.initial_seed())
    # First: it refuses prompts whose positions do not correspond.
    task_change = setting.change()
    values = read_values(model, pairs, place, batch_size)
    basis = _basis(direction, values, str(place))
    seen = row_space(model.weights.reading(values.site))
    visible, hidden = split(basis, seen)
    stream = place.kind.startswith("resid")
    weight = None if stream else next(model.weights.reading(values.site))
    parts = {"site": None, "direction": basis, "visible": visible, "hidden": hidden}
    patches = {
        name: _patch(place, name, model.wiring, partial(values.change, part, weight), values, part)
        for name, part in parts.items()
        if part is None or len(part)
    }
    effects = measure(setting, list(patches.values()))
    circuit, _ = total_circuit(setting, list(patches.values()), "all", None, effects)
    found = {
        mode: dict(zip(patches, tensor, strict=True)) | {"task": task_change}
        for mode, tensor in effects.items()
    }
    distinct = distinct_rows(pairs)
    illusions = [m for m, by in found.items() if is_illusion(by, distinct, setting.seed)]
    summary = {
        "site": str(place),
        "direction": str(direction),
        "n_dimensions": len(basis),
        "width": basis.shape[1],
        "n_seen": seen.shape[1],
        "visible_share": float((basis @ seen).square().sum() / len(basis)),
        "share": _share(found),
        "illusion": illusions,
    }
    _tell(circuit, patches, found, summary)
    circuit.graph["method"] = f"exact patching of a subspace, {' and '.join(setting.modes)}"
    add_panels(circuit, task.metric)
    return circuit


# --- the site -------------------------------------------------------------------------------------


def _place(text: str, model: TracedModel, pairs: EncodedTask) -> Site:
    site, described = parse_site(text), model.architecture
    streams = ("resid_pre", "resid_mid", "resid_post", "mlp_post")
    if site.kind not in streams and not (site.kind == "z" and site.head is not None):
        raise OptionError(f"site {text!r} has no readers of its own; give {_SITES}")
    behind = {"z": described.attention_post_norm, "mlp_post": described.mlp_post_norm}
    if behind.get(site.kind):
        raise OptionError(
            f"site {text!r} writes through the norm {behind[site.kind]} of {described.family}, "
            f"which is no linear map; give resid_mid or resid_post"
        )
    if site.position is None:
        return site
    return Site(site.kind, site.layer, site.head, from_the_end(site, text, pairs))


def read_values(
    model: TracedModel, pairs: EncodedTask, site: Site, batch_size: int | None = None
) -> Values:
    """Read a site in the clean and the corrupt run of every pair.

    Raises:
        SiteError: the model has no such site.
        NumericsError: an activation is not finite.
    """
    whole, width = Site(site.kind, site.layer, site.head), pairs.clean.ids.shape[1]
    parts: dict[str, list[Tensor]] = {"clean": [], "corrupt": []}
    for batch in pairs.batches(choose_batch_size(model, pairs, batch_size)):
        for name, found in parts.items():
            value = model.run(getattr(batch, name), read=[whole], logits="none")[whole].double()
            missing = width - value.shape[1]
            found.append(torch.nn.functional.pad(value, (0, 0, missing, 0)))
    where = pairs.clean.mask & pairs.corrupt.mask
    if site.position is not None:
        only = torch.zeros_like(where)
        only[:, site.position] = True
        where = where & only
    rows = {number: row for row, number in enumerate(pairs.numbers)}
    return Values(whole, torch.cat(parts["clean"]), torch.cat(parts["corrupt"]), where, rows)


# --- the direction -------------------------------------------------------------------------------


def _basis(direction: str | Path, values: Values, site: str) -> Tensor:
    """The subspace as orthonormal rows, ``[k, width]``."""
    if direction not in ("mean-difference", "pca"):
        return read_subspace(Path(direction), values.clean.shape[-1], site).to(values.clean)
    differences = values.difference[values.where]
    vector: Tensor = differences.mean(0)
    if direction == "pca":
        vector = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    size = float(differences.norm(dim=-1).max())
    if not float(vector.norm()) > 1e-9 * size or not size:
        fact = "do not differ" if not size else "differ by 0 on average"
        raise OptionError(
            f"--direction {direction}: clean and corrupt runs {fact} at {site}; give another site "
            f"or position, or a file"
        )
    unit: Tensor = vector / vector.norm()
    return unit[None]


# --- what is said ---------------------------------------------------------------------------------


def _patch(
    place: Site,
    name: str,
    wiring: Wiring,
    change: Callable[[Patcher], Tensor],
    values: Values,
    part: Tensor | None,
) -> Patch:
    """The patch of a part, added where what it changes first appears in the stream."""
    assert place.layer is not None
    joins = Site(place.kind, place.layer)
    if place.kind in ("z", "mlp_post"):
        middle = place.kind == "z" and not wiring.parallel
        joins = Site("resid_mid" if middle else "resid_post", place.layer)
    data: dict[str, Any] = {"kind": "subspace", "layer": place.layer}
    if part is not None:
        data |= {"label": str(place), "n_dimensions": len(part), **separation(values, part)}
    return Patch(str(place) if name == "site" else name, joins, change, data)


def separation(values: Values, part: Tensor) -> dict[str, float | None]:
    """How the clean and the corrupt values differ along a part ``[k, width]``."""
    clean, corrupt = values.clean[values.where] @ part.T, values.corrupt[values.where] @ part.T
    axis = corrupt.mean(0) - clean.mean(0)
    length = float(axis.norm())
    axis = axis / length if length else torch.eye(len(part))[0].to(axis)
    means = [float((value @ axis).mean()) for value in (clean, corrupt)]
    spread = [float((value @ axis).std(correction=0)) for value in (clean, corrupt)]
    pooled = ((spread[0] ** 2 + spread[1] ** 2) / 2) ** 0.5
    return {
        "clean_mean": means[0],
        "corrupt_mean": means[1],
        "clean_std": spread[0],
        "corrupt_std": spread[1],
        "separation": (means[1] - means[0]) / pooled if pooled else None,
    }


def is_illusion(effects: dict[str, Tensor], distinct: list[int], seed: int) -> bool:
    """Whether a direction does much more than each of its parts, surely.

    Args:
        effects: Of ``direction``, ``visible``, ``hidden`` and the ``task``, ``[n_pairs]`` each.
        distinct: Pairs that repeat no earlier one.
        seed: Of the bootstrap.
    """
    if not {"visible", "hidden"} <= effects.keys():
        return False
    sign = {name: 1.0 if float(effect.mean()) >= 0 else -1.0 for name, effect in effects.items()}
    joint = sign["direction"] * effects["direction"]
    # A mean is larger in size than another where it is above both that and its negative.
    parts = [side * effects[name] for name in ("visible", "hidden") for side in (1, -1)]
    margins = [joint - FACTOR * part for part in parts]
    margins.append(joint - SHARE * sign["task"] * effects["task"])
    rows = torch.stack(margins)[:, distinct]
    bounds = mean_intervals(rows, seed)
    return all(
        (float(row.mean()) if bound is None else bound[0]) > 0
        for row, bound in zip(rows, bounds, strict=True)
    )


def _share(found: dict[Mode, dict[str, Tensor]]) -> float | None:
    """Effect of the direction / of the site, in the mode in which the site does more."""
    by_mode = [(float(by["site"].mean()), float(by["direction"].mean())) for by in found.values()]
    whole, own = max(by_mode, key=lambda pair: abs(pair[0]))
    return own / whole if whole else None


def _tell(
    circuit: CircuitGraph,
    patches: dict[str, Patch],
    found: dict[Mode, dict[str, Tensor]],
    summary: dict[str, Any],
) -> None:
    """Put results into the graph, its findings and its warnings."""
    findings = {p.name: effect_text(circuit.nodes[p.name]) for p in patches.values()}
    if summary["share"] is not None:
        findings["direction"] += f", {summary['share']:.0%} of the site's"
    seen = f"{summary['visible_share']:.0%} of its squared length"
    findings["readers see"] = (
        f"{seen}; {summary['n_seen']} of the site's {summary['width']} dimensions"
    )
    circuit.graph |= {"subspace": summary, "findings": findings}
    circuit.graph["warnings"] = [
        f"ILLUSION in mode {mode}: patching the direction at {summary['site']} does "
        f"{float(found[mode]['direction'].mean()):+.3g}, its visible part alone "
        f"{float(found[mode]['visible'].mean()):+.3g} and its hidden part alone "
        f"{float(found[mode]['hidden'].mean()):+.3g}: what no reader sees drives what is else "
        f"at rest, and the model need not use this direction"
        for mode in summary["illusion"]
    ]
