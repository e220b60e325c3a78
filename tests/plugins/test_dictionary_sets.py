"""Sets of dictionaries in a folder: written whole, read with distrust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, read_set, write_set
from circuitlab_feature_interactions.sites import site_pairs, sites_of

import circuitlab
from circuitlab import Dictionary, DictionaryInfo, ModelError, SiteError


@pytest.fixture(scope="module")
def model() -> Any:
    return circuitlab.load_model("ioi-mini")


def make_set(model: Any, text: str = "mlp.0, mlp.2", width: int | None = None) -> DictionarySet:
    pairs = site_pairs(text, model)
    dictionaries = {}
    generator = torch.Generator().manual_seed(0)
    width = width or model.d_model
    for site in sites_of(pairs):
        rows = torch.randn(7, width, generator=generator)
        dictionaries[site] = Dictionary(
            rows.T,
            torch.zeros(7),
            rows,
            torch.ones(width),
            k=3,
            apply_b_dec_to_input=True,
            info=DictionaryInfo(site=str(site), model=model.name, context_length=20),
        )
    return DictionarySet(dictionaries, pairs, {"about": {"k": 3}, "history": {"step": [0.0]}})


def test_a_set_survives_its_files(model: Any, tmp_path: Path) -> None:
    """What is read is what was written: pairs, sites, weights bit for bit, facts."""
    written = make_set(model)
    write_set(written, tmp_path)
    read = read_set(tmp_path, model)
    assert (list(read.pairs), dict(read.info)) == (list(written.pairs), dict(written.info))
    assert list(read.dictionaries) == list(written.dictionaries)
    assert len(read.dictionaries) == 4
    for site, dictionary in read.dictionaries.items():
        wanted = written.dictionaries[site].state_dict()
        assert dictionary.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[n]) for n, value in dictionary.state_dict().items())
        assert dictionary.info.reads == site
    assert read.warnings == ()


def test_another_model_is_told_or_refused(model: Any, tmp_path: Path) -> None:
    """A model of the same shape gets a warning, one of other layers or width an error."""
    write_set(make_set(model), tmp_path / "a")
    docstring = circuitlab.load_model("docstring-mini")
    warnings = read_set(tmp_path / "a", docstring).warnings
    assert len(warnings) == 1
    assert "trained with another model: ioi-mini" in warnings[0]
    with pytest.raises(SiteError, match="layers of induction run from 0 to 1"):
        read_set(tmp_path / "a", circuitlab.load_model("induction"))
    write_set(make_set(model, width=5), tmp_path / "b")
    with pytest.raises(SiteError, match="64 numbers, and the dictionary reads 5"):
        read_set(tmp_path / "b", model)


def test_the_end_of_a_shallower_model_is_no_middle(model: Any, tmp_path: Path) -> None:
    """A set whose last stream is in the middle of this model is refused, not misread."""
    induction = circuitlab.load_model("induction")
    write_set(make_set(induction, "block"), tmp_path)
    with pytest.raises(ModelError, match=r"resid_post\.1 for block\.1.*another model"):
        read_set(tmp_path, model)


def test_longer_prompts_are_told(model: Any, tmp_path: Path) -> None:
    """Use on longer prompts than in training is a warning, said once."""
    write_set(make_set(model), tmp_path)
    found = read_set(tmp_path, model, DictionaryInfo(context_length=30))
    assert len(found.warnings) == 1
    assert "trained on 20 tokens per prompt" in found.warnings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "not of a set"),
        (lambda d: d.update(pairs=[]), "has no pairs"),
        (lambda d: d.update(pairs=[7]), "holds 7 among its pairs"),
        (lambda d: d["pairs"][0].update(target="resid_pre.1"), "belongs to another model"),
    ],
)
def test_damaged_facts_are_refused(model: Any, tmp_path: Path, change: Any, message: str) -> None:
    """A set.json that says something else than what was written is refused by name."""
    write_set(make_set(model), tmp_path)
    document = json.loads((tmp_path / "set.json").read_text())
    change(document)
    (tmp_path / "set.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=message):
        read_set(tmp_path, model)


def test_what_is_no_set_is_refused(model: Any, tmp_path: Path) -> None:
    """No folder, no set.json, no JSON, an unfinished training, exchanged dictionaries."""
    with pytest.raises(ModelError, match=r"holds no set\.json; train one with circuitlab dict"):
        read_set(tmp_path / "none", model)
    (tmp_path / "set.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_set(tmp_path, model)
    (tmp_path / "set.json").unlink()
    (tmp_path / "training.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="not complete"):
        read_set(tmp_path, model)
    write_set(make_set(model), tmp_path)
    (tmp_path / "mlp_in.0").rename(tmp_path / "kept")
    (tmp_path / "mlp_out.0").rename(tmp_path / "mlp_in.0")
    (tmp_path / "kept").rename(tmp_path / "mlp_out.0")
    with pytest.raises(ModelError, match=r"no autoencoder of mlp_in\.0"):
        read_set(tmp_path, model)
