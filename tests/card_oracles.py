"""Random dictionaries to draw up cards of, and a card's feature from plain runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from circuitlab_feature_interactions.cards import measuring
from circuitlab_feature_interactions.cards.reading import Feature
from circuitlab_feature_interactions.dictionary_sets import DictionarySet, write_set
from circuitlab_feature_interactions.sites import site_pairs, sites_of
from torch import Tensor

import circuitlab
from circuitlab import Dictionary, DictionaryInfo, Site, Tokens

#: Seed of the cards.
SEED = 4


def write_card_set(model: Any, folder: Path) -> Path:
    """A set of the second block: random latents, and the last that never is active."""
    pairs = site_pairs("mlp.1", model)
    dictionaries = {}
    for number, site in enumerate(sites_of(pairs)):
        rows = torch.randn(12, model.d_model, generator=torch.Generator().manual_seed(number))
        rows = torch.nn.functional.normalize(rows, dim=1)
        bias = torch.zeros(12)
        bias[11] = -1e6
        info = DictionaryInfo(site=str(site), model=model.name, context_length=model.n_positions)
        dictionaries[site] = Dictionary(
            rows.T, bias, rows, torch.zeros(model.d_model), apply_b_dec_to_input=False, info=info
        )
    write_set(DictionarySet(dictionaries, pairs, {"about": {}}), folder)
    return folder


def dictionary_of(folder: Path, card: Any) -> tuple[Site, Dictionary]:
    """Where a card's feature is, and its dictionary."""
    dictionary = circuitlab.read_dictionary(folder / card["site"])
    assert dictionary.info.reads is not None
    return dictionary.info.reads, dictionary


def read(model: Any, folder: Path, card: Any, tokens: Tokens) -> Tensor:
    """A card's feature from a plain run and the formulas, ``[batch, pos]``."""
    site, dictionary = dictionary_of(folder, card)
    x = model.run(tokens, read=[site], logits="none")[site].double()
    if card["kind"] == "latent":
        column = dictionary.W_e[:, card["latent"]].detach().double()
        return (x @ column + dictionary.b_e[card["latent"]].detach().double()).relu()
    feature = Feature(site, dictionary, card["latent"])
    direction = measuring._control(feature, SEED).direction
    assert direction is not None
    assert float(direction.norm()) == pytest.approx(1)
    return (x @ direction.double() - card["threshold"]).relu()


def alone(ids: Tensor) -> Tokens:
    """One prompt, without padding."""
    return Tokens(ids[None], torch.ones(1, len(ids), dtype=torch.bool))
