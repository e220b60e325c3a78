"""A model on a host gives the numbers it gives here, in few round trips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_host import Loopback, model_key
from random_tasks import random_task

from circuitlab import Edge, Site, TracedModel, build_circuit, edge_effects, load_model
from circuitlab.baseline import measure
from circuitlab.progress import listening

IDS = [[3, 4, 5, 6, 7], [1, 2, 3]]


def jobs(model: TracedModel) -> int:
    """Round trips that a model has made."""
    engine: Any = model._engine
    return int(engine.client.jobs)


@pytest.mark.parametrize("name", ["test/ids", "test/llama", "test/neox", "test/gemma2"])
def test_runs_are_those_of_this_machine(
    on_host: Callable[..., TracedModel], folders: dict[str, Path], name: str
) -> None:
    """Logits, sites, gradients, sources and receivers of a host's model are those found here."""
    far, near = on_host(name), load_model(folders[name])
    sites = [*near.source_sites, Site("mlp_in", 1), Site("q", 0, head=1)]

    def run(model: TracedModel) -> Any:
        ids = torch.tensor([1, 5, 9])
        spot = {Site("mlp_out", 0, position=-1): torch.full((), 0.3)}
        return model.run(
            IDS,
            read=sites,
            write=spot,
            vocabulary=ids,
            gradient_of=lambda logits: logits[:, 0] - logits[:, 1] ** 2,
            gradient_at=(Site("resid_pre", 0), *model.receiver_sites),
        )

    there, here = run(far), run(near)
    torch.testing.assert_close(there.logits, here.logits, rtol=1e-5, atol=1e-5)
    for site in sites:
        torch.testing.assert_close(there[site], here[site], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        far.source_outputs(there), near.source_outputs(here), rtol=1e-5, atol=1e-5
    )
    for (block, one), (_, other) in zip(
        far.receiver_gradients(there), near.receiver_gradients(here), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=str(block))


def test_skipped_parts_are_those_of_this_machine(
    far_ids: TracedModel, near_ids: TracedModel, host: Loopback
) -> None:
    """Writing whole streams and attentions, and stopping early, give what they give here."""
    read = Site("resid_post", 1)
    given = near_ids.run(IDS, read=[Site("resid_pre", 1), Site("attn_out", 1)])
    write = {s: given[s] + 0.1 for s in (Site("resid_pre", 1), Site("attn_out", 1))}
    for how in ({"logits": "none", "read": [read]}, {"logits": "all"}, {"logits": "last"}):
        options: dict[str, Any] = {"write": write, **how}
        there, here = far_ids.run(IDS, **options), near_ids.run(IDS, **options)
        torch.testing.assert_close(there.logits, here.logits, rtol=1e-5, atol=1e-5)
        if "read" in how:
            torch.testing.assert_close(there[read], here[read], rtol=1e-5, atol=1e-5)


def test_weights_are_fetched_once(far_ids: TracedModel, near_ids: TracedModel) -> None:
    """A host's weights are bit for bit those on the disk, and asking again asks nobody."""
    before = jobs(far_ids)
    for _ in range(2):
        for which in "qkvo":
            assert torch.equal(far_ids.weights.heads(1, which), near_ids.weights.heads(1, which))
        assert torch.equal(far_ids.weights.embedding(), near_ids.weights.embedding())
        assert torch.equal(far_ids.weights.unembedding()[0], near_ids.weights.unembedding()[0])
    # The self-check at load had fetched them.
    assert jobs(far_ids) == before
    assert far_ids.n_parameters == near_ids.n_parameters


@pytest.mark.parametrize("name", ["test/ids", "test/llama", "test/neox", "test/gemma2"])
def test_the_self_check_takes_three_round_trips(
    on_host: Callable[..., TracedModel], host: Loopback, name: str
) -> None:
    """Type and weights; every run that waits for no other; those that write what was read."""
    before = len(host.log())
    model = on_host(name)
    assert len(host.log()) - before == jobs(model) == 3


def test_weights_of_large_models_come_in_parts(
    on_host: Callable[..., TracedModel], near_ids: TracedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a size, a part is fetched with the same part of other layers, as far as room is."""
    monkeypatch.setattr("circuitlab.remote.skeleton.WHOLE", 0)
    far = on_host("test/ids")
    module: Any = far._module
    module._here.clear()
    before = jobs(far)
    far.weights.heads(0, "q")
    assert module._here == {f"transformer.h.{layer}.attn.c_attn" for layer in range(2)}
    far.weights.heads(1, "q")
    assert jobs(far) == before + 1
    monkeypatch.setattr("circuitlab.remote.skeleton.AT_ONCE", 1)
    far.weights.heads(0, "o")
    assert "transformer.h.1.attn.c_proj" not in module._here
    assert torch.equal(far.weights.heads(1, "o"), near_ids.weights.heads(1, "o"))
    assert jobs(far) == before + 3


def test_self_check_of_large_models(
    on_host: Callable[..., TracedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a size, embeddings, MLPs and unembedding stay on the host; that is told."""
    monkeypatch.setattr("circuitlab.checks.FETCHED", 0)
    monkeypatch.setattr("circuitlab.remote.skeleton.WHOLE", 0)
    told: list[str] = []
    with listening(lambda *_: None, told.append):
        far = on_host("test/ids")
    assert len(told) == 1
    assert "leaves out its embeddings, MLPs and unembedding" in told[0]
    module: Any = far._module
    here = module._here
    assert "transformer.h.1.attn.c_proj" in here
    for name in ("transformer.wte", "transformer.h.0.mlp.c_fc", "lm_head"):
        assert name not in here


def test_runs_begun_together_share_a_round_trip(far_ids: TracedModel, host: Loopback) -> None:
    """Nothing is sent before a run is looked at; then all that were begun go in one job."""
    before = len(host.log())
    runs = [far_ids.run([[n, n + 1]], read=[Site("z", 0)]) for n in range(5)]
    assert len(host.log()) == before
    forgotten = far_ids.run([[1, 2]])
    del forgotten
    logits = [run.logits for run in runs]
    assert len(host.log()) == before + 1
    assert not torch.equal(logits[0], logits[1])
    # What was written is what it was then, whatever became of the tensor.
    value = torch.zeros(16)
    changed = far_ids.run([[1, 2]], write={Site("resid_pre", 1, position=0): value})
    value.fill_(9.0)
    expected = far_ids.run([[1, 2]], write={Site("resid_pre", 1, position=0): torch.zeros(16)})
    assert torch.equal(changed.logits, expected.logits)
    assert len(host.log()) == before + 2


def test_large_work_is_split(
    far_ids: TracedModel, host: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too large for one job goes in several; what is too large to wait goes at once."""
    from circuitlab.remote.engine import Shipment
    from circuitlab.tracing import Pass

    site = Site("z", 0)
    values = [far_ids.run([[n, n + 1]], read=[site])[site] for n in range(4)]
    # One place of two positions is read.
    monkeypatch.setattr("circuitlab.remote.engine.PER_JOB", 2 * (2 * 16 * 4))
    before = len(host.log())
    runs = [far_ids.run([[n, n + 1]], read=[site]) for n in range(4)]
    assert len(host.log()) == before + 1
    for run, value in zip(runs, values, strict=True):
        assert torch.equal(run[site], value)
    assert len(host.log()) == before + 2
    monkeypatch.setattr("circuitlab.remote.engine.PER_JOB", 1)
    engine: Any = far_ids._engine
    read = ("read", "transformer.h.0", "output", 0)
    engine.send(3 * [Shipment(Pass(far_ids.tokens(IDS), [read]).inputs, [read])])
    assert len(host.log()) == before + 5


def test_a_run_that_fails_spoils_no_other(far_ids: TracedModel) -> None:
    """What is wrong with one run is raised where that run is looked at, each time."""

    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("a metric's own fault")

    start = Site("resid_pre", 0)
    bad = far_ids.run(IDS, gradient_of=broken, gradient_at=[start])
    good = far_ids.run(IDS, gradient_of=lambda logits: logits[:, 0], gradient_at=[start])
    assert good.gradient(start).abs().sum() > 0
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="own fault"):
            _ = bad.logits


def test_numbers_that_are_not_finite_are_refused(far_ids: TracedModel) -> None:
    """The first site that is not finite is named, as on this machine."""
    from circuitlab import NumericsError

    run = far_ids.run(IDS, write={Site("attn_out", 1): torch.full((), torch.inf)})
    with pytest.raises(NumericsError, match=r"infinity at site attn_out\.1"):
        _ = run.logits


@pytest.mark.parametrize(("method", "steps"), [("eap", 1), ("eap-ig", 3), ("eap-ig", 12)])
def test_edge_attribution_takes_three_round_trips(
    far_ids: TracedModel, near_ids: TracedModel, method: str, steps: int
) -> None:
    """Scores are those found here; each batch of pairs costs at most three round trips."""
    from circuitlab_edge_attribution.attribution import edge_scores

    task = random_task([6] * 6)
    options: Any = {"method": method, "ig_steps": steps, "batch_size": 3}
    before = jobs(far_ids)
    there = edge_scores(far_ids, far_ids.encode(task), **options)
    assert jobs(far_ids) - before <= 3 * 2
    here = edge_scores(near_ids, near_ids.encode(task), **options)
    torch.testing.assert_close(there.scores, here.scores, rtol=1e-5, atol=1e-5)
    assert there.completeness.gap == pytest.approx(here.completeness.gap, abs=1e-5)


@pytest.mark.parametrize("n", [1, 10, 64, None])
@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_exact_patching_takes_few_round_trips(
    far_ids: TracedModel, near_ids: TracedModel, n: int | None, mode: Any
) -> None:
    """n edges, each patched, cost at most n / 64 + 3 round trips; effects are those found here."""
    task = random_task([6] * 3)
    edges: list[Edge] = list(near_ids.wiring.edges)
    torch.manual_seed(0)
    chosen = [edges[i] for i in torch.randperm(len(edges))[:n].tolist()]
    before = jobs(far_ids)
    there = edge_effects(far_ids, far_ids.encode(task), chosen, mode=mode)
    assert jobs(far_ids) - before <= len(chosen) / 64 + 3
    here = edge_effects(near_ids, near_ids.encode(task), chosen, mode=mode)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


def test_measuring_a_task_takes_one_round_trip(far_ids: TracedModel, near_ids: TracedModel) -> None:
    """Clean and corrupt prompts of a batch go together."""
    pairs = far_ids.encode(random_task([6] * 3))
    before = jobs(far_ids)
    there = measure(far_ids, pairs)
    assert jobs(far_ids) - before == 1
    here = measure(near_ids, pairs)
    torch.testing.assert_close(there.corrupt, here.corrupt, rtol=1e-5, atol=1e-5)


def test_circuits_are_those_of_this_machine(far_ids: TracedModel, near_ids: TracedModel) -> None:
    """A whole analysis gives the same circuit, and says that it ran remotely."""
    task = random_task([6] * 4)
    there = build_circuit(far_ids, task, top=20, verify=5, allow_weak=True)
    here = build_circuit(near_ids, task, top=20, verify=5, allow_weak=True)
    assert there.graph["remote"] is True
    assert here.graph["remote"] is False
    assert set(there.edges) == set(here.edges)
    for edge, data in here.edges.items():
        assert there.edges[edge]["score"] == pytest.approx(data["score"], abs=1e-5)


def test_nnsights_own_client_agrees(
    host: Loopback, folders: dict[str, Path], near_ids: TracedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server speaks the protocol: nnsight's own client gets its logits over the websocket."""
    import nnsight
    from nnsight.intervention.backends.remote import RemoteBackend

    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    engine: Any = load_model(folders["test/ids"], remote=host.url, remote_key="test/ids")._engine
    envoy = engine._envoy
    backend = RemoteBackend(model_key("test/ids"), host=host.url)
    with torch.no_grad(), envoy.trace(input_ids=torch.tensor([[3, 4, 5]]), backend=backend):
        logits = nnsight.save(envoy.output.logits.detach())
    expected = near_ids.run([[3, 4, 5]], logits="all").logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_nnsights_local_simulation_agrees(folders: dict[str, Path], near_ids: TracedModel) -> None:
    """The block that travels also runs in nnsight's own simulation of a host."""
    from nnsight import TransformersModel
    from nnsight.intervention.backends.local import LocalSimulationBackend
    from transformers import AutoModelForCausalLM

    from circuitlab.prompts import Tokens
    from circuitlab.remote.engine import Shipment, _trace
    from circuitlab.remote.skeleton import empty_tokenizer
    from circuitlab.tracing import Pass

    class Simulated(LocalSimulationBackend):  # type: ignore[misc]  # untyped upstream
        def __call__(self, tracer: Any) -> None:
            super().__call__(tracer)
            self.results = tracer.info.frame.f_locals["results"]

    module: Any = AutoModelForCausalLM.from_pretrained(folders["test/ids"])
    envoy = TransformersModel(module, task="text-generation", tokenizer=empty_tokenizer())
    ids = torch.tensor([[3, 4, 5]])
    inputs = Pass(Tokens(ids, torch.ones_like(ids, dtype=torch.bool)), [], keep_all=True).inputs
    backend = Simulated(envoy)
    _trace(envoy, backend, [tuple(Shipment(inputs, [])), tuple(Shipment(None, [("dtype",)]))])
    logits, dtype = backend.results
    expected = near_ids.run([[3, 4, 5]], logits="all").logits
    torch.testing.assert_close(logits["logits"], expected, rtol=1e-5, atol=1e-5)
    assert dtype == {"dtype": "torch.float32"}
