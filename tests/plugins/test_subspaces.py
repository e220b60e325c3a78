"""Subspace patching: brute force by hooks, identities, and illusions that were built by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import path_oracles
import pytest
import torch
from circuitlab_path_patching.directions import row_space, split
from circuitlab_path_patching.subspaces import subspace_patching
from families import family_model
from path_scores import TOLERANCES, Brute, gap, small_model
from random_tasks import random_task
from torch import Tensor

from circuitlab import (
    CircuitGraph,
    OptionError,
    PromptPair,
    SiteError,
    Task,
)
from circuitlab.testing import check_analysis

MODES = ("noise", "denoise")
WIDTHS = {"resid_pre.1": 16, "resid_mid.0": 16, "resid_post.0": 16, "z.0.h1": 8, "mlp_post.0": 64}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def score(circuit: CircuitGraph, site: str, part: str = "") -> float:
    """The total effect of a part, on its arrow and on its node."""
    name = part or site
    value = circuit.edges[name, "logits", ""]["score"]
    assert circuit.nodes[name]["score"] == value
    return float(value)


# --- exactness ------------------------------------------------------------------------------------


class Hooked:
    """A site of a stock model, by a plain hook at the module that holds it."""

    def __init__(self, brute: Brute, site: str) -> None:
        self.run = brute.run
        kind, layer, *head = site.split(".")
        plain = self.run.model
        block = plain.blocks[int(layer)]
        neox = plain.parallel
        self.columns = slice(None)
        if kind == "z":
            size, number = plain.d_head, int(head[0][1:])
            self.columns = slice(number * size, (number + 1) * size)
            self.module = plain.output_projection(int(layer))
        elif kind == "mlp_post":
            self.module = block.mlp.dense_4h_to_h if neox else block.mlp.c_proj
        elif kind == "resid_mid":
            self.module = block.ln_2
        else:
            later = int(layer) + (kind == "resid_post")
            self.module = plain.blocks[later] if later < plain.n_layers else plain.final_norm
        self.overwrites = kind == "resid_mid"

    def _hooked(self, ids: Tensor, change: Callable[[Tensor], Tensor | None]) -> Tensor:
        def before(_: Any, given: tuple[Any, ...]) -> Any:
            new = change(given[0][..., self.columns])
            if new is None:
                return None
            # The block holds on to resid_mid for its skip: only in place does it see a change.
            whole = given[0] if self.overwrites else given[0].clone()
            whole[..., self.columns] = new
            return (whole, *given[1:])

        handle = self.module.register_forward_pre_hook(before)
        try:
            return path_oracles.Pass(self.run.model).run(ids, self.run.mask).logits
        finally:
            handle.remove()

    def read(self, ids: Tensor) -> Tensor:
        kept: list[Tensor] = []
        self._hooked(ids, lambda value: kept.append(value.clone()))
        return kept[0]

    def patched(self, projection: Tensor, where: Tensor) -> Tensor:
        """Logits when the projection of the site on a space is the other run's."""
        assert self.run.other_ids is not None
        other = self.read(self.run.other_ids)
        size = where[..., None].to(other)
        return self._hooked(
            self.run.ids, lambda value: value + size * ((other - value) @ projection)
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("family", "site"),
    # Parallel blocks have no middle.
    [case for case in product(TOLERANCES, WIDTHS) if case != ("neox", "resid_mid.0")],
)
def test_a_patched_plane_is_that_of_brute_force(
    family: str, site: str, mode: Any, saved: Callable[[Tensor], Path]
) -> None:
    """x + P (x_other - x) at one position of padded prompts, and at all of them."""
    width = 32 if (family, site) == ("neox", "mlp_post.0") else WIDTHS[site]
    module, model = small_model(family)
    task = random_task([6, 4, 3])
    pairs = model.encode(task)
    brute = Brute(module, pairs, mode)
    hooked = Hooked(brute, site)
    rows = random(2, width)
    basis = torch.linalg.qr(rows.T).Q
    dtype = brute.run.base.logits.dtype
    projection, whole = (basis @ basis.T).to(dtype), torch.eye(width, dtype=dtype)
    last = torch.zeros(3, 6, dtype=torch.bool)
    last[:, -2] = True
    mask = pairs.clean.mask
    for text, where in ((f"{site}[-2]", last & mask), (site, mask)):
        circuit = subspace_patching(
            model, task, site=text, direction=saved(rows), mode=mode, batch_size=2
        )
        for part, space in (("direction", projection), ("", whole)):
            expected = float(brute.effect(hooked.patched(space, where)).mean())
            assert abs(score(circuit, text, part) - expected) < TOLERANCES[family]
        share = circuit.graph["subspace"]["share"]
        assert share == pytest.approx(score(circuit, text, "direction") / score(circuit, text))
        assert abs(score(circuit, text)) > 1e-3


@pytest.mark.parametrize("site", ["mlp_post.1[-1]", "z.1.h0[-1]", "resid_mid.1[-1]"])
def test_directions_of_the_pairs_themselves(site: str) -> None:
    """The mean difference, and the first right singular vector of the differences."""
    module, model = small_model("gpt2")
    task = random_task([5, 5, 5, 5])
    brute = Brute(module, model.encode(task))
    hooked = Hooked(brute, site.partition("[")[0])
    assert brute.run.other_ids is not None
    difference = (hooked.read(brute.run.other_ids) - hooked.read(brute.run.ids))[:, -1]
    first = torch.linalg.eigh(difference.T @ difference).eigenvectors[:, -1]
    where = torch.arange(5).expand(4, 5) == 4
    for name, vector in (("mean-difference", difference.mean(0)), ("pca", first)):
        unit = vector / vector.norm()
        expected = float(brute.effect(hooked.patched(torch.outer(unit, unit), where)).mean())
        circuit = subspace_patching(model, task, site=site, direction=name, mode="noise")
        assert score(circuit, site, "direction") == pytest.approx(expected, abs=1e-9)


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["mlp_post.0[-1]", "z.1.h0", "resid_mid.0"])
def test_all_dimensions_are_the_whole_site(site: str, saved: Callable[[Tensor], Path]) -> None:
    """Whatever rows span the space; and what readers see is then all of the effect."""
    width = WIDTHS.get(site.partition("[")[0], 8)
    _, model = small_model("gpt2")
    circuit = subspace_patching(
        model, random_task([6, 4]), site=site, direction=saved(random(width + 3, width))
    )
    assert circuit.graph["subspace"]["n_dimensions"] == width
    whole = score(circuit, site)
    assert abs(whole) > 1e-3
    assert score(circuit, site, "direction") == pytest.approx(whole, abs=1e-9)
    if not site.startswith("resid"):
        assert score(circuit, site, "visible") == pytest.approx(whole, abs=1e-9)
    assert circuit.graph["subspace"]["illusion"] == []


def test_another_basis_of_a_space_changes_nothing(saved: Callable[[Tensor], Path]) -> None:
    """Rows turned, stretched and repeated span the same plane."""
    _, model = small_model("gpt2")
    task, site, rows = random_task([6, 4]), "mlp_post.1[-1]", random(3, 64)
    circuits = [
        subspace_patching(model, task, site=site, direction=saved(mixed))
        for mixed in (rows, random(3, 3, seed=1) @ rows, torch.cat([rows, 1e3 * rows[:1]]))
    ]
    for circuit in circuits:
        assert circuit.graph["subspace"]["n_dimensions"] == 3
        for name, data in circuit.nodes(data=True):
            if name != "logits":
                assert data["score"] == pytest.approx(circuits[0].nodes[name]["score"], abs=1e-9)


@pytest.mark.parametrize("site", ["mlp_post.1[-1]", "mlp_post.0"])
def test_what_no_reader_sees_does_nothing(site: str, saved: Callable[[Tensor], Path]) -> None:
    """A direction in the row space has no hidden part, one in the null space no effect."""
    module, model = small_model("gpt2")
    weight = module.transformer.h[int(site[9])].mlp.c_proj.weight.detach()
    seen = torch.linalg.qr(weight).Q
    vector = random(64)
    visible = seen @ (seen.T @ vector)
    task = random_task([6, 4])
    inside = subspace_patching(model, task, site=site, direction=saved(visible))
    assert "hidden" not in inside
    assert score(inside, site, "visible") == pytest.approx(score(inside, site, "direction"))
    assert inside.graph["subspace"]["visible_share"] == pytest.approx(1)
    assert inside.graph["subspace"]["n_seen"] == 16
    outside = subspace_patching(model, task, site=site, direction=saved(vector - visible))
    assert "visible" not in outside
    assert score(outside, site, "direction") == pytest.approx(0, abs=1e-12)
    assert outside.graph["subspace"]["visible_share"] == pytest.approx(0)
    both = subspace_patching(model, task, site=site, direction=saved(vector))
    assert score(both, site, "hidden") == pytest.approx(0, abs=1e-12)
    share = float(visible.norm() / vector.norm()) ** 2
    assert both.graph["subspace"]["visible_share"] == pytest.approx(share)
    assert both.graph["findings"]["readers see"] == (
        f"{share:.0%} of its squared length; 16 of the site's 64 dimensions"
    )


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_mid.0[-1]", "resid_post.1"])
def test_of_the_stream_only_its_mean_is_hidden_by_norms(
    site: str, saved: Callable[[Tensor], Path]
) -> None:
    """LayerNorm takes out a constant, whose patch does nothing; 15 other dimensions are seen."""
    _, model = small_model("gpt2")
    circuit = subspace_patching(model, random_task([6, 4]), site=site, direction=saved(random(16)))
    assert circuit.graph["subspace"]["n_seen"] == 15
    assert score(circuit, site, "hidden") == pytest.approx(0, abs=1e-12)
    assert abs(score(circuit, site, "visible")) > 1e-3
    one = torch.ones(16)
    alone = subspace_patching(model, random_task([6, 4]), site=site, direction=saved(one))
    assert "visible" not in alone


def test_parts_of_a_plane() -> None:
    """A plane that meets what is seen in one line and what is not in none: closed form."""
    seen = torch.eye(4, dtype=torch.float64)[:, :2]
    half = 0.5**0.5
    basis = torch.tensor([[1.0, 0, 0, 0], [0, half, half, 0]], dtype=torch.float64)
    visible, hidden = split(basis, seen)
    assert gap(visible.T @ visible, torch.diag(torch.tensor([1.0, 1, 0, 0]))) < 1e-12
    assert gap(hidden.T @ hidden, torch.diag(torch.tensor([0.0, 0, 1, 0]))) < 1e-12


@pytest.mark.parametrize("widths", [(3,), (3, 3), (5, 40, 2), (12,)])
def test_row_space_is_what_readers_span(widths: tuple[int, ...]) -> None:
    """Of narrow and wide readers of any size, in a space of 10; a zero reader sees nothing."""
    plane = random(10, 6)
    readers = [10.0 ** (3 * n) * plane @ random(6, width, seed=n) for n, width in enumerate(widths)]
    found = row_space([*readers, torch.zeros(10, 4).double()])
    whole = torch.cat([reader / reader.norm() for reader in readers], 1)
    assert found.shape == (10, min(6, sum(widths)))
    assert gap(found.T @ found, torch.eye(found.shape[1]).double()) < 1e-12
    assert gap(found @ (found.T @ whole), whole) < 1e-9
    assert row_space([torch.zeros(10, 4).double()]).shape == (10, 0)


# --- the circuit ----------------------------------------------------------------------------------


def test_the_contract_is_kept() -> None:
    """Padded prompts, any batch size, the same circuit twice, without an option."""
    circuit = check_analysis(subspace_patching_with_options)
    assert set(circuit) >= {"resid_post.0[-1]", "direction", "logits"}
    assert {data["kind"] for _, _, data in circuit.edges(data=True)} == {"total"}


def subspace_patching_with_options(model: Any, task: Task, *, batch_size: int = 4) -> CircuitGraph:
    """Subspace patching."""
    return subspace_patching(model, task, batch_size=batch_size)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("z.0[-1]", r"site 'z\.0\[-1\]' has no readers of its own; give resid_pre"),
        ("mlp_out.0", "has no readers of its own"),
        ("logits", "has no readers of its own"),
        ("mlp.0", "site kind 'mlp' is unknown"),
        ("mlp_post 0", "cannot be read; write KIND"),
        ("resid_post.0[-9]", "the shortest prompt has 4 tokens"),
    ],
)
def test_sites_that_cannot_be_patched(site: str, message: str) -> None:
    """Each says what is wrong and what to give."""
    _, model = small_model("gpt2")
    with pytest.raises(OptionError, match=message):
        subspace_patching(model, random_task([6, 4]), site=site)
    with pytest.raises(SiteError, match="layers run from 0 to 1"):
        subspace_patching(model, random_task([4]), site="resid_post.7")


@pytest.mark.parametrize("site", ["z.0.h1", "mlp_post.1"])
def test_what_writes_through_a_norm_is_refused(site: str) -> None:
    """A norm behind attention or MLP makes the write no linear map of the site."""
    with pytest.raises(OptionError, match=r"writes through the norm post_\w+norm of"):
        subspace_patching(family_model("gemma2"), random_task([4, 4]), site=site)


def test_directions_that_cannot_be_used(saved: Callable[[Tensor], Path], tmp_path: Path) -> None:
    """Files of another width, without a number, or not there; runs that are the same."""
    _, model = small_model("gpt2")
    task = random_task([4, 4])

    def refused(direction: Any, message: str, site: str = "resid_post.0[-1]") -> None:
        with pytest.raises(OptionError, match=message):
            subspace_patching(model, task, site=site, direction=direction)

    refused(tmp_path / "none", "cannot be read: .*; give mean-difference, pca, or a safetensors")
    refused(saved(torch.ones(8)), r"tensors of shape \[\[8\]\]; site .* needs one, \[16\] or \[k")
    refused(saved(torch.ones(1, 1, 16)), r"of shape \[\[1, 1, 16\]\]")
    refused(saved(torch.zeros(16)), "holds NaN, infinity or only zeros")
    refused(saved(torch.full((16,), float("nan"))), "holds NaN, infinity or only zeros")
    words = [PromptPair((1, a), (1, b), (3,), (4,)) for a, b in ((5, 6), (6, 5))]
    task = Task("turned", tuple(words))
    refused("mean-difference", "clean and corrupt runs do not differ", "resid_pre.0[0]")
    refused("pca", "clean and corrupt runs do not differ", "resid_pre.0[0]")
    refused("mean-difference", "differ by 0 on average", "resid_pre.0[-1]")
    subspace_patching(model, task, site="resid_pre.0[-1]", direction="pca")
