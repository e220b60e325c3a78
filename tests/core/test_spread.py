"""Models spread over memory and disk: the numbers of the same model whole, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_module
from random_tasks import random_task
from transformers import AutoModelForCausalLM

from circuitlab import (
    Edge,
    ModelError,
    OptionError,
    Site,
    TracedModel,
    edge_effects,
    load_model,
    read_circuit,
)
from circuitlab.spread import SpreadModule

IDS = [[3, 4, 5, 6, 7], [1, 2, 3]]
#: Where the parts of a model stand, by family, and its unembedding.
PARTS = {
    "llama": ("model", "embed_tokens layers.0 layers.1 norm rotary_emb", "lm_head"),
    "gemma2": ("model", "embed_tokens layers.0 layers.1 norm rotary_emb", "lm_head"),
    "neox": ("gpt_neox", "embed_in layers.0 layers.1 final_layer_norm rotary_emb", "lm_head"),
    "gpt2": ("transformer", "wte wpe h.0 h.1 ln_f", "lm_head"),
}


def mixed(family: str) -> dict[str, str]:
    """The second block is on the disk, and so is the unembedding where it is no embedding."""
    inside, parts, last = PARTS[family]
    where = {f"{inside}.{part}": "disk" if part[-1] == "1" else "cpu" for part in parts.split()}
    return {**where, last: "cpu" if family in ("gemma2", "gpt2") else "disk"}


@pytest.fixture(scope="module", params=("llama", "gemma2", "neox"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of a family, on the disk."""
    path: Path = tmp_path_factory.mktemp("spread") / request.param
    module: Any = random_module(request.param)
    module.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def near(folder: Path) -> TracedModel:
    """The model in memory."""
    return load_model(folder)


@pytest.fixture(scope="module")
def far(folder: Path) -> TracedModel:
    """The model spread."""
    return load_model(folder, device_map=mixed(folder.name), offload=folder.parent / "offload")


def weights_in_memory(model: TracedModel) -> int:
    """How many of a spread model's weights are in memory now."""
    module: Any = model._module
    return sum(p.numel() for p in module.module.parameters() if p.device.type != "meta")


def test_runs_are_those_of_the_whole_model(near: TracedModel, far: TracedModel) -> None:
    """Logits, sites, gradients, sources and receivers, with writes at either place: the same."""
    layers = range(near.n_layers)
    sites = [*near.source_sites, *(Site(k, n) for k in ("mlp_in", "q", "pattern") for n in layers)]
    write = {Site("mlp_out", n, position=-1): torch.full((), 0.3) for n in layers}

    def run(model: TracedModel) -> Any:
        return model.run(
            IDS,
            read=sites,
            write=write,
            vocabulary=torch.tensor([1, 5, 9]),
            gradient_of=lambda logits: logits[:, 0] - logits[:, 1] ** 2,
            gradient_at=(Site("resid_pre", 0), *model.receiver_sites),
        )

    before = weights_in_memory(far)
    there, here = run(far), run(near)
    torch.testing.assert_close(there.logits, here.logits, rtol=1e-5, atol=1e-6)
    for site in sites:
        torch.testing.assert_close(there[site], here[site], rtol=1e-5, atol=1e-6)
    for (_, one), (_, other) in zip(
        far.receiver_gradients(there), near.receiver_gradients(here), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert 0 < before < near.n_parameters
    assert weights_in_memory(far) == before


@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "resid_post"])
def test_blocks_on_the_disk_can_be_skipped(kind: str, near: TracedModel, far: TracedModel) -> None:
    """A whole output written where no weight is in memory stands for the module."""
    value = torch.linspace(-1, 1, near.d_model)
    found = [model.run(IDS, write={Site(kind, 1): value}).logits for model in (far, near)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_weights_are_the_real_ones(near: TracedModel, far: TracedModel) -> None:
    """Every accessor gives the bytes of the whole model, and the same digest and count."""

    def given(model: TracedModel) -> list[torch.Tensor]:
        weights, stream = model.weights, torch.linspace(-1, 2, 3 * model.d_model)
        found = [weights.heads(n, w) for n in range(model.n_layers) for w in "qkvo"]
        found += [part for n in range(model.n_layers) for part in astuple(weights.folded(n))[:5]]
        found += [weights.embedding(), *weights.unembedding()]
        found += [next(weights.reading(Site("mlp_post", n))) for n in range(model.n_layers)]
        return [*found, weights.norm_scale(None, stream.view(3, -1))]

    for one, other in zip(given(far), given(near), strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(one, other)
    assert far.weights_digest == near.weights_digest
    assert far.n_parameters == near.n_parameters
    assert (far.device, far.dtype) == (near.device, near.dtype)


def test_effects_are_those_of_the_whole_model(near: TracedModel, far: TracedModel) -> None:
    """Scores by gradients and by patching each edge are those of the model in memory."""
    from circuitlab_edge_attribution.attribution import edge_scores

    task = random_task([6] * 3)
    edges: list[Edge] = list(near.wiring.edges)[::7]
    scores, effects = [], []
    for model in (far, near):
        pairs = model.encode(task)
        scores.append(edge_scores(model, pairs, ig_steps=2).scores)
        effects.append(edge_effects(model, pairs, edges))
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*effects, rtol=1e-5, atol=1e-6)


def test_a_module_that_someone_has_dispatched(ids_model: Path, tmp_path: Path) -> None:
    """A live module is spread where it is, tied weights and all; controls anew are refused."""
    where = {"transformer": "disk", "lm_head": "disk"}
    loader: Any = AutoModelForCausalLM
    module = loader.from_pretrained(
        ids_model, device_map=where, offload_folder=tmp_path, attn_implementation="eager"
    )
    far, near = load_model((module, None)), load_model(ids_model)
    assert weights_in_memory(far) == 0
    assert (far.n_parameters, far.weights_digest) == (near.n_parameters, near.weights_digest)
    start = Site("resid_pre", 0)
    there, here = (
        model.run(IDS, gradient_of=lambda logits: logits[:, 3], gradient_at=[start])
        for model in (far, near)
    )
    torch.testing.assert_close(there.logits, here.logits)
    torch.testing.assert_close(there.gradient(start), here.gradient(start))
    # Its weights learn as they did.
    assert all(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(ModelError, match="is spread over devices, and with new weights it would"):
        far.reinitialised()


def test_one_device_is_no_spread(ids_model: Path) -> None:
    """Where every weight ends up on one device, the model is the ordinary one, byte for byte."""
    for where in ("cpu", {"": "cpu"}):
        far, near = load_model(ids_model, device_map=where), load_model(ids_model)
        assert not isinstance(far._module, SpreadModule)
        assert torch.equal(far.run(IDS).logits, near.run(IDS).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_type_is_the_type(dtype: Any, ids_model: Path, tmp_path: Path) -> None:
    """A spread model has the type that was asked for, and the numbers of that type."""
    where = {"transformer": "disk", "lm_head": "disk"}
    far = load_model(ids_model, dtype=dtype, device_map=where, offload=tmp_path)
    near = load_model(ids_model, dtype=dtype)
    assert far.dtype == near.dtype == getattr(torch, dtype)
    torch.testing.assert_close(far.run(IDS).logits, near.run(IDS).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cpu", "device_map": "auto"}, "--device cpu and --device-map both say where"),
        ({"remote": True, "device_map": "auto"}, "weights are on its host"),
        ({"remote": True, "offload": "x"}, "weights are on its host"),
        ({"device_map": "autoo"}, "--device-map autoo cannot be used: .*try auto, balanced"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], words: str, ids_model: Path) -> None:
    """One place is asked for, and it is one that there is."""
    with pytest.raises(OptionError, match=words):
        load_model(ids_model, **options)


def test_what_is_small_or_in_memory_is_not_spread(ids_module: Any) -> None:
    """Bundled models and live modules refuse a map: it would do nothing."""
    for source, words in (("gate-and", "bundled model 'gate-and'"), (ids_module, "a live module")):
        with pytest.raises(OptionError, match=f"{words} needs none"):
            load_model(source, offload="x")


def test_without_accelerate(ids_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the command that brings it."""
    monkeypatch.setattr("circuitlab.loading.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"need accelerate, .* run `pip install accelerate`"):
        load_model(ids_model, device_map="auto")


def test_weights_that_are_nowhere(ids_module: Any) -> None:
    """A module on the meta device is refused by name, and gives no logits."""
    import copy

    empty = copy.deepcopy(ids_module).to("meta")
    with pytest.raises(ModelError, match=r"has the weights of '.*' on the meta device"):
        load_model((empty, None))


def test_the_command(lab: Callable[..., Any], ids_model: Path, ids_task: Path) -> None:
    """A map in a JSON file: the circuit of the model in memory; a bad file is exit 2."""
    command = ("trace", "--task-file", ids_task, "--allow-weak", "--verify", "0")
    Path("map.json").write_text(json.dumps(mixed("gpt2")))
    where = ("--device-map", "map.json", "--offload", "offload")
    found = []
    for more in (where, ()):
        assert lab(*command, "--model", ids_model, *more, "--output", "c.json").code == 0
        found.append(list(read_circuit(Path("c.json")).effects()))
    for one, other in zip(*found, strict=True):
        assert one == (*other[:3], pytest.approx(other[3], rel=1e-5))
    for text in ("[", "[]", None):
        if text is None:
            Path("map.json").unlink()
        else:
            Path("map.json").write_text(text)
        done = lab(*command, "--model", ids_model, *where)
        assert (done.code, "--device-map 'map.json'" in done.err) == (2, True)
