"""Every built-in analysis on a host: what it finds is what it finds on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, write_set
from circuitlab_feature_interactions.sites import site_pairs
from family_table import OPTIONS, Outcome, assert_same, data
from feature_oracles import dictionaries
from random_tasks import random_task

from circuitlab import DictionaryInfo, TracedModel, build_circuit
from circuitlab.registry import Registry


def test_all_are_here() -> None:
    """An analysis that is added is tried on a host."""
    built_in = {
        name
        for name, analysis in Registry.load().analyses.items()
        if Registry.load().plugins[analysis.plugin].distribution == "circuitlab"
    }
    assert built_in == set(OPTIONS)


def saved_dictionaries(model: TracedModel, folder: Path) -> Path:
    """Random dictionaries of a model's MLPs."""
    pairs = site_pairs("mlp", model)
    found = dictionaries(pairs)
    for site, one in found.items():
        one.info = DictionaryInfo(site=str(site), model=model.name, context_length=16)
    write_set(DictionarySet(found, pairs, {}), folder)
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_circuit_is_that_of_this_machine(
    far_ids: TracedModel, near_ids: TracedModel, tmp_path: Path, name: str
) -> None:
    """The same components, edges and texts, and every number within 1e-5 of the largest."""
    options = dict(OPTIONS[name])
    if name == "feature-interactions":
        options["dictionaries"] = saved_dictionaries(near_ids, tmp_path)
    found = []
    for model in (far_ids, near_ids):
        torch.manual_seed(0)
        found.append(
            Outcome(
                data(build_circuit(model, random_task([6] * 4), name, allow_weak=True, **options))
            )
        )
    assert_same(*found)
