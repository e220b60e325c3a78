"""The command ``dict train``: dictionaries whose features interact little."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from circuitlab_feature_interactions.settings import Arch, InteractionKind, TrainSettings
from circuitlab_feature_interactions.sites import sites_of
from circuitlab_feature_interactions.training import train

if TYPE_CHECKING:
    from circuitlab import TracedModel


def train_dictionaries(
    model: TracedModel,
    *,
    sites: str = "mlp.0",
    arch: Arch = "topk",
    k: int = 8,
    expansion: float = 4.0,
    interaction: InteractionKind = "l1",
    strength: float = 0.024,
    estimator: str = "tokens:64",
    warmup: float = 0.05,
    steps: int = 1500,
    batch_tokens: int = 512,
    learning_rate: float | None = None,
    sparsity: float | None = None,
    data: Path | None = None,
    context_length: int | None = None,
    output: Path = Path("dictionaries"),
    checkpoint_every: int = 200,
) -> dict[str, Any]:
    """Train sparse autoencoders of a model's sites together, with few interactions between them.

    What is drawn at random follows from torch's seed. See :class:`settings.TrainSettings` for the
    settings, and :func:`training.train` for what is raised.

    Returns:
        Plain JSON by label: of each site centred R², active latents per token, dead latents' share
        and the number of the dictionary's parameters; of each pair its interactions at the last
        step.
    """
    asked = {name: value for name, value in locals().items() if name not in ("model", "output")}
    found = train(model, TrainSettings(**asked, seed=torch.initial_seed()), output)
    told: dict[str, Any] = {"folder": str(output), "steps": steps, "tokens": steps * batch_tokens}
    statistics, history = found.info["statistics"], found.info["history"]
    for site in map(str, sites_of(found.pairs)):
        own = statistics[site]
        for name in ("r2", "l0"):
            if name in own:
                told[f"{name} {site}"] = own[name]
        told[f"dead {site}"] = own["dead"]["share"]
        told[f"parameters {site}"] = found.info["parameters"][site]
    for pair in found.pairs:
        if values := history.get(f"interactions {pair}"):
            told[f"interactions {pair}"] = values[-1]
    told["held out"] = statistics["held_out"]
    if notes := found.info["notes"]:
        told["notes"] = notes
    return told
