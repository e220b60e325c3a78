"""Plateau regions: the classes of a model's outputs, and where walks cross from one to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from circuitlab import (
    CircuitGraph,
    Curve,
    Curves,
    OptionError,
    Site,
    SiteError,
    check_cut,
    read_dictionary,
)
from circuitlab_activation_plateaus.regions import graphs
from circuitlab_activation_plateaus.regions.clustering import Criterion, likeness
from circuitlab_activation_plateaus.regions.finding import (
    Kind,
    RegionFacts,
    Regions,
    describe,
    find_regions,
)
from circuitlab_activation_plateaus.regions.graphs import Border, Matches, Names
from circuitlab_activation_plateaus.regions.normals import (
    HALVINGS,
    Crossings,
    Directions,
    Facing,
    Walkers,
    face,
    find_crossings,
    token_directions,
)
from circuitlab_activation_plateaus.regions.slices import slice_plane, third_corner
from circuitlab_activation_plateaus.walks.bundle import parse_site
from circuitlab_activation_plateaus.walks.pairs import Bank, make_bank
from circuitlab_activation_plateaus.walks.paths import PATHS
from circuitlab_activation_plateaus.walks.walking import clean, walk

if TYPE_CHECKING:
    from circuitlab import Task, TracedModel


def plateau_regions(
    model: TracedModel,
    task: Task | None = None,
    *,
    pairs: str = "last-token",
    bank_size: int = 64,
    site: str = "resid_post.0",
    path: Literal["slerp", "lerp", "embed"] = "slerp",
    steps: int = 21,
    regions: Kind = "argmax",
    k: int | None = None,
    k_by: Criterion = "silhouette",
    dictionary: Path | None = None,
    matches: int = 3,
    slice_pair: int = 1,
    slice_steps: int = 31,
    top: int | Literal["all"] = 40,
    batch_size: int | None = None,
) -> CircuitGraph:
    """Walk between activations, and draw the regions of outputs that the walks cross.

    Args:
        model: Any traced model.
        task: For prompts, where the model has no texts of its own.
        pairs: See :func:`.walks.pairs.make_bank`.
        bank_size: Pairs, at most.
        site: The residual stream that is replaced at the last position.
        path: ``slerp``, ``lerp``, or ``embed`` (straight, at ``resid_pre.0``).
        steps: Points of each walk; regions that lie between two points of one region are not seen.
        regions: ``argmax``: states with the same most likely token; ``kmeans`` and
            ``agglomerative``: clusters of log-probabilities.
        k: Number of clusters; None chooses.
        k_by: What chooses it.
        dictionary: Folder of a dictionary of the site, whose features normals are held against.
        matches: Directions to name for each border.
        slice_pair: Number of the pair the slice goes through; 0 for no slice.
        slice_steps: Points along each side of the slice.
        top: Borders to keep, by the number of walks.
        batch_size: Steps per pass; None chooses.

    Returns:
        The region graph, see :func:`.regions.graphs.region_circuit`: a component of kind ``region``
        each, with its token, mass and variance; an effect for each border, with location, slope,
        normal and the directions nearest to it.

    Raises:
        OptionError: an option is out of range, or needs what is not there.
        TaskError: no pair can be made.
        NumericsError: logits are not finite.
    """
    _check(path, matches, top, batch_size)
    for flag, value in (("--steps", steps), ("--slice-steps", slice_steps)):
        if value < 2:
            raise OptionError(f"{flag} {value} is too few; give 2 or more")
    seed = torch.initial_seed()
    place = parse_site(site, model.n_layers, path)
    sets = [token_directions(model), *_latents(dictionary, model, place)]
    bank = make_bank(model, task, pairs, bank_size, seed)
    _check_slice(slice_pair, bank)
    walking = _Walking(model, bank, place, path, steps, batch_size, seed)
    found = walking.go(lambda states: find_regions(states, regions, k=k, k_by=k_by, seed=seed))
    chance = {named.name: named.chance(seed) for named in sets}
    tokens = [fact.token for fact in found.facts]
    held = Matches(sets, matches, sets[0].vectors[tokens], chance)
    circuit = _graph(found, walking, held)
    if slice_pair:
        _add_slice(circuit, walking, slice_pair - 1, slice_steps)
    graphs.add_panels(circuit, found.facts, found.borders, found.names)
    if regions != "argmax":
        _add_choice(circuit, found, k_by, seed)
    if top == "all" or top >= circuit.number_of_edges():
        return circuit
    return circuit.top(top)


@dataclass(frozen=True, eq=False)
class _Found:
    """What the walks gave; ``logits`` are ``[n_rows, n_steps, vocab]``."""

    regions: Regions
    logits: Tensor
    labels: Tensor
    crossings: Crossings
    facing: Facing
    facts: Sequence[RegionFacts]
    names: Names
    borders: Sequence[Border]


@dataclass(frozen=True, eq=False)
class _Walking:
    """Walks between the pairs of a bank."""

    model: TracedModel
    bank: Bank
    site: Site
    path: str
    steps: int
    batch_size: int | None
    seed: int

    def go(self, regions_of: Callable[[Tensor], Regions]) -> _Found:
        """Walk, tell the states' regions, and find where the walks cross."""
        model, bank, site, path = self.model, self.bank, self.site, PATHS[self.path]
        a, b = (clean(model, tokens, [site])[site] for tokens in (bank.a, bank.b))
        t = torch.linspace(0, 1, self.steps, dtype=torch.float64, device=model.device)
        logits = walk(model, bank.a, site, path(a, b, t), t=t, batch_size=self.batch_size).logits
        states = logits.flatten(0, 1)
        regions = regions_of(states)
        labels = regions.assign(logits)
        walkers = Walkers(model, bank.a, site, path, (a, b), self.batch_size)
        crossings = find_crossings(regions, t.expand(len(bank), -1), labels, walkers.logits)
        facts = describe(regions, states, labels.flatten())
        names = Names(model.token_texts([fact.token for fact in facts]))
        facing = face(regions, crossings, walkers)
        order = graphs.in_order(len(regions), crossings)
        borders = graphs.find_borders(order, crossings, facing, self.seed)
        return _Found(regions, logits, labels, crossings, facing, facts, names, borders)


def _graph(found: _Found, walking: _Walking, held: Matches) -> CircuitGraph:
    """The region graph with its findings."""
    bank, ends = walking.bank, found.labels[:, [0, -1]].flatten().cpu()
    circuit = graphs.region_circuit(
        found.facts,
        found.borders,
        found.names,
        held,
        layer=walking.site.layer or 0,
        ends=ends,
        n_walks=len(bank),
    )
    said = graphs.findings(
        found.facts,
        found.borders,
        found.names,
        found.crossings,
        found.facing,
        ends=ends,
        n_walks=len(bank),
    )
    circuit.graph["findings"] = said | graphs.matched(circuit)
    circuit.graph["method"] = (
        f"{len(bank)} pairs ({bank.kind}) walked by {walking.path} at {walking.site}, "
        f"{walking.steps} points; regions by {found.regions.kind}; crossings to "
        f"1/{(walking.steps - 1) * 2**HALVINGS} of the path or better"
    )
    return circuit


def _check(path: str, matches: int, top: int | Literal["all"], batch_size: int | None) -> None:
    check_cut(top, None)
    if path not in PATHS:
        raise OptionError(f"--path {path!r} is unknown; use {', '.join(PATHS)}")
    if matches < 1:
        raise OptionError(f"--matches {matches} is too few; give 1 or more")
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch size {batch_size} is too small; use 1 or more")


def _check_slice(pair: int, bank: Bank) -> None:
    if not 0 <= pair <= len(bank):
        raise OptionError(
            f"--slice-pair {pair}: there are {len(bank)} pairs; give 1 to {len(bank)}, 0 for none"
        )


def _latents(folder: Path | None, model: TracedModel, site: Site) -> list[Directions]:
    """What the latents of a dictionary of the site write."""
    if folder is None:
        return []
    dictionary = read_dictionary(folder, device=model.device)
    dictionary.check_for(model)
    writes = dictionary.info.writes
    if writes is None or parse_site(str(writes), model.n_layers) != site:
        raise SiteError(
            f"the dictionary writes {writes}, and walks are at {site}; give one of {site}, or "
            f"another --site"
        )
    rows = dictionary.W_d.detach().float()
    return [Directions("dictionary", rows, lambda chosen: [f"feature {i}" for i in chosen])]


def _add_slice(circuit: CircuitGraph, walking: _Walking, pair: int, steps: int) -> None:
    """The plane through a pair's prompts and the one whose output is most unlike theirs."""
    model, bank, site = walking.model, walking.bank, walking.site
    both = [clean(model, tokens, [site, Site("logits")]) for tokens in (bank.a, bank.b)]
    activations, outputs = (
        torch.cat([side[kept] for side in both]) for kept in (site, Site("logits"))
    )
    second = pair + len(bank)
    third = third_corner(activations, outputs, pair, second)
    corners = activations[[pair, second, third]]
    try:
        found = slice_plane(
            model,
            bank.a.rows([pair]),
            site,
            corners,
            steps=steps,
            batch_size=walking.batch_size,
        )
    except OptionError as error:
        circuit.graph["warnings"] = [f"no slice: {error}"]
        return
    labels = [label[0] for label in bank.labels] + [label[1] for label in bank.labels]
    found.panel([labels[i] for i in (pair, second, third)], site).add_to(circuit)
    clear = float((found.similarity.amax(-1) > 0.5).double().mean())
    circuit.graph["findings"]["slice"] = (
        f"{clear:.0%} of the plane gives one of the three outputs to within half the distance to "
        f"the next"
    )


def _add_choice(circuit: CircuitGraph, found: _Found, k_by: Criterion, seed: int) -> None:
    """How the number of clusters was chosen, and whether half of the walks give the same ones."""
    regions, logits = found.regions, found.logits
    if len(regions.criterion) > 1:
        x, y = zip(*sorted(regions.criterion.items()), strict=True)
        name = {"silhouette": "mean silhouette", "bic": "BIC"}[k_by]
        Curves(
            title="How many regions",
            caption=f"{len(regions)} are drawn, of {min(x)} to {max(x)}. Higher is better.",
            x=x,
            x_label="number of clusters",
            y_label=name,
            curves=[Curve(name=regions.kind, mean=y, mark=len(regions))],
        ).add_to(circuit)
    if len(logits) < 2:
        return
    halves = [
        find_regions(
            logits[start::2].flatten(0, 1), regions.kind, k=len(regions), k_by=k_by, seed=seed
        )
        for start in (0, 1)
    ]
    a, b = (half.assign(logits).flatten() for half in halves)
    circuit.graph["findings"]["stability"] = (
        f"clusters of either half of the walks put the states into the same regions to "
        f"{likeness(a, b):.2f} (adjusted Rand index: 1 the same, 0 chance)"
    )
