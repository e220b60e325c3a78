"""Retraining: a set's training done again, with another setting or on another model."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab import OptionError
from circuitlab_feature_interactions.data import PromptStream
from circuitlab_feature_interactions.settings import TrainSettings
from circuitlab_feature_interactions.training import train

if TYPE_CHECKING:
    from circuitlab import TracedModel
    from circuitlab_feature_interactions.dictionary_sets import DictionarySet


def settings_of(found: DictionarySet, **changes: Any) -> TrainSettings:
    """The settings that a set was trained with, some of them changed.

    Raises:
        OptionError: the set does not say how it was trained.
    """
    about = found.info.get("about", {})
    names = {one.name for one in fields(TrainSettings)} - {"data", "checkpoint_every"}
    if missing := sorted(names - set(about)):
        raise OptionError(
            f"the set of dictionaries does not say with what {missing[0]} it was trained, so the "
            f"same cannot be done again; train it with circuitlab dict train"
        )
    return TrainSettings(**{name: about[name] for name in names} | changes)


def train_again(
    model: TracedModel, found: DictionarySet, data: Path | None, **changes: Any
) -> DictionarySet:
    """A set trained as ``found`` was, but for some settings, on a model; kept in memory alone.

    Args:
        model: The model of ``found``, or one that reads the same tokens.
        found: Whose settings, seed and texts.
        data: File of the texts that it was trained on; None for the model's corpus.
        changes: Settings that are others.

    Raises:
        OptionError: the set does not say how it was trained, or was trained on other texts.
        ModelError: the model has no corpus.
    """
    settings = settings_of(found, data=data, **changes)
    stream = PromptStream(model, data, settings.context_length, settings.seed)
    if (digest := found.info["about"].get("data_digest")) != stream.digest:
        raise OptionError(
            f"the set of dictionaries was trained on other texts (digest {str(digest)[:12]}) than "
            f"{stream.name} ({stream.digest[:12]}), and a control is trained on the same; give "
            f"the file of its training (--data FILE)"
        )
    with tempfile.TemporaryDirectory(prefix="circuitlab-") as folder:
        return train(model, settings, Path(folder))
