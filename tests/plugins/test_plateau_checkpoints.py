"""Checkpoints: saved models walked one by one, against plain walks, and folders that do not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from circuitlab_activation_plateaus.sharpness.checkpoints import add_checkpoints, checkpoint_folders
from circuitlab_activation_plateaus.walks.bundle import Settings
from circuitlab_activation_plateaus.walks.pairs import Bank
from freeze_oracles import Plain
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from circuitlab import (
    CircuitGraph,
    Curves,
    ModelError,
    OptionError,
    Site,
    Tokens,
    load_model,
    panels_of,
    zoo,
)

STEPS = 7
SETTINGS = Settings(Site("resid_pre", 1), "lerp", "d-sym", STEPS, refine=0)
#: Training steps and the seeds of the models that stand for them.
SAVED = {200: 1, 20: 0}


def gpt2(seed: int, vocab_size: int = 30) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=12, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    module = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return module


def bank() -> Bank:
    ids = torch.randint(1, 30, (3, 5), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 7) % 29 + 1
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Bank(Tokens(ids, mask), Tokens(other, mask), [("a", "b")] * 3, True, "test")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of two checkpoints, a file and a folder that is no model."""
    for step, seed in SAVED.items():
        gpt2(seed).save_pretrained(tmp_path / f"step-{step:06}")
    (tmp_path / "losses.csv").write_text("0,1\n")
    (tmp_path / "logs").mkdir()
    return tmp_path


def curves_by_hooks(seed: int) -> tuple[Tensor, Tensor]:
    """d_sym of the logits ``[n_pairs, n_steps]`` and excess by pair, of plain walks."""
    module, pairs = gpt2(seed), bank()
    plain = Plain(module, load_model(module).architecture)
    curves, excess = [], []
    for a, b in zip(pairs.a.ids, pairs.b.ids, strict=True):
        hidden = [module(x[None], output_hidden_states=True).hidden_states[1] for x in (a, b)]
        ends = [state[0, -1] for state in hidden]
        way = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, STEPS)[:, None])
        values = plain.walk(a, 1, way, {})[0].double()
        apart = [(values - values[end]).norm(dim=-1) for end in (0, -1)]
        curves.append(apart[0] / (apart[0] + apart[1]))
        # A straight way has slope 1.
        excess.append(curves[-1].diff().max() * (STEPS - 1))
    return torch.stack(curves), torch.stack(excess)


def test_each_checkpoint_is_walked(run: Path) -> None:
    """Models come in the order of their steps, each with the curve and sharpness of plain walks."""
    circuit = CircuitGraph()
    add_checkpoints(circuit, load_model(gpt2(1)), bank(), run, SETTINGS)
    data = json.loads(json.dumps(circuit.graph, allow_nan=False))["checkpoints"]
    assert [model["step"] for model in data["models"]] == [20, 200]
    for model in data["models"]:
        curves, excess = curves_by_hooks(SAVED[model["step"]])
        assert model["n_pairs"] == 3
        assert model["curve"]["mean"] == pytest.approx(curves.mean(0).tolist(), abs=1e-4)
        assert model["excess"]["median"] == pytest.approx(float(excess.median()), rel=1e-3)
        low, high = model["excess"]["interval"]
        assert float(excess.min()) - 1e-3 <= low <= high <= float(excess.max()) + 1e-3
    assert data["models"][0]["curve"] != data["models"][1]["curve"]
    multiples, training = panels_of(circuit)
    assert isinstance(multiples, Curves)
    assert isinstance(training, Curves)
    assert multiples.apart
    assert [curve.name for curve in multiples.curves] == ["step 20", "step 200"]
    assert list(training.x) == [20, 200]
    assert "at step 20," in circuit.graph["findings"]["checkpoints"]


def test_folders_are_found_and_sorted(run: Path) -> None:
    """Steps sort as numbers, and by the last one in a name; what is no model is passed over."""
    (run / "step-000020").rename(run / "run2-step-1000")
    assert [step for step, _ in checkpoint_folders(run)] == [200, 1000]


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ("final", "'final' has no number"),
        ("epoch-200", "'epoch-200' and 'step-000200' are both step 200"),
    ],
)
def test_names_that_do_not_tell_a_step_are_refused(run: Path, rename: str, words: str) -> None:
    """Each model folder needs a number of its own."""
    (run / "step-000020").rename(run / rename)
    with pytest.raises(OptionError, match=words):
        checkpoint_folders(run)


def test_folder_without_models_is_refused(tmp_path: Path) -> None:
    """Nothing to walk in is an error that names the folder, there or not."""
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(OptionError, match="holds no model folders"):
            checkpoint_folders(folder)


def test_model_of_another_run_is_refused(tmp_path: Path) -> None:
    """A checkpoint of another shape cannot read the same tokens."""
    gpt2(0, vocab_size=40).save_pretrained(tmp_path / "step-1")
    with pytest.raises(ModelError, match="vocab_size is 40"):
        add_checkpoints(CircuitGraph(), load_model(gpt2(0)), bank(), tmp_path, SETTINGS)


def test_tokenizer_of_another_run_is_refused(tmp_path: Path) -> None:
    """Checkpoints whose tokenizer has other words for the pairs' tokens are refused."""
    module, tokenizer = zoo.load("induction")
    zoo.save(module, tokenizer, tmp_path / "step-1")
    words = tmp_path / "step-1" / "tokenizer.json"
    words.write_text(words.read_text().replace('"cat"', '"kat"'))
    model = load_model("induction")
    ids = model.tokens(["bag fox", "bag cat"])
    pairs = Bank(ids.rows([0]), ids.rows([1]), [("fox", "cat")], True, "test")
    with pytest.raises(ModelError, match="tokenizer"):
        add_checkpoints(CircuitGraph(), model, pairs, tmp_path, SETTINGS)


def test_checkpoint_whose_output_stands_still(tmp_path: Path) -> None:
    """A model that answers the same whatever it reads has no curve, and says so."""
    silent = gpt2(0)
    silent.transformer.ln_f.weight.zero_()
    silent.save_pretrained(tmp_path / "step-1")
    circuit = CircuitGraph()
    add_checkpoints(circuit, load_model(gpt2(0)), bank(), tmp_path, SETTINGS)
    assert circuit.graph["checkpoints"]["models"] == [{"step": 1, "n_pairs": 0}]
    assert "plots" not in circuit.graph
