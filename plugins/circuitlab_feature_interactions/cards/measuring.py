"""Measuring: everything a card shows, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from circuitlab import DictionaryInfo, OptionError, track
from circuitlab_feature_interactions.cards.choosing import choose_latents
from circuitlab_feature_interactions.cards.context import (
    context_dependence,
    token_ablations,
    until,
)
from circuitlab_feature_interactions.cards.examples import (
    density_facts,
    draw_examples,
    excerpt,
    histogram,
)
from circuitlab_feature_interactions.cards.lens import LogitLens
from circuitlab_feature_interactions.cards.reading import (
    Feature,
    Readings,
    prompt_batches,
    read_features,
)
from circuitlab_feature_interactions.data import PromptStream, generator_of, seed_of
from circuitlab_feature_interactions.dictionary_sets import read_set
from circuitlab_feature_interactions.drawing import latent_name
from circuitlab_feature_interactions.evaluating import draw

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Prompts of the corpus are drawn with the seed and this, which no training draws with.
_CARDS = 1_000_033


def card_data(
    model: TracedModel,
    *,
    dictionaries: Path,
    features: str = "top:12",
    data: Path | None = None,
    n_tokens: int = 20_000,
    context_length: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What cards of latents show, beside each the same of a random direction.

    The direction is uniform on the sphere, and read as ``max(x · u - t, 0)`` with ``t`` such that
    it is active at as many of the tokens as the latent.

    Args:
        model: The model the dictionaries are of.
        dictionaries: Folder of the set, as ``circuitlab dict train`` wrote it.
        features: See :func:`choosing.choose_latents`.
        data: File of texts; None for the model's own corpus.
        n_tokens: At least so many, as far as a file has them.
        context_length: Most tokens of a prompt; None: as many as the model reads.
        seed: Of prompts, examples, replacements and directions.

    Returns:
        Plain JSON: ``model``, ``data``, ``tokens``, ``prompts``, ``seed``, ``warnings``, and
        ``cards``, of each ``latent`` and ``control``, None for a latent that is silent. A card has
        ``name``, ``site``, ``latent``, ``kind`` (``latent`` or ``random direction``), ``density``
        (:func:`examples.density_facts`), ``lens`` (:meth:`lens.LogitLens.ends`), and where it is
        active ``histogram``, ``top`` (the largest activation as :func:`examples.excerpt`), ``bins``
        (:func:`examples.draw_examples`), ``ablations`` (:func:`context.token_ablations` of the top
        example) and ``context`` (:func:`context.context_dependence`); of directions ``threshold``.

    Raises:
        OptionError: ``features`` names what is not there, or a number is not positive.
        ModelError: there is no set in the folder, or the model has no corpus.
        SiteError: the model has no such site.
        TaskError: the texts cannot be read.
        NumericsError: activations are not finite.
    """
    if n_tokens < 1:
        raise OptionError(f"--n-tokens {n_tokens} is too small; give 1 or more")
    stream = PromptStream(model, data, context_length, seed_of(seed, _CARDS))
    own = read_set(dictionaries, model, DictionaryInfo(**stream.facts()))
    _, prompts = draw(stream, n_tokens)
    prompts = sorted(prompts, key=len)
    batches = prompt_batches(prompts, model.device)
    chosen = choose_latents(features, model, own.dictionaries, batches)
    latents = [Feature(site, own.dictionaries[site], latent) for site, latent in chosen]
    controls = [_control(feature, seed) for feature in latents]
    readings = read_features(model, [*latents, *controls], prompts)
    maker = _Maker(model, readings, LogitLens(model), stream.bos, seed)
    cards = []
    for number, feature in enumerate(track(latents, "drawing up cards")):
        values = readings.values[number]
        control, projected = controls[number], readings.values[number + len(latents)]
        beside = None
        if active := int((values > 0).sum()):
            control = replace(control, threshold=_threshold(projected, active))
            beside = maker.card(control, (projected - control.threshold).relu())
        cards.append({"latent": maker.card(feature, values), "control": beside})
    return {
        "model": model.name,
        "data": stream.name,
        "tokens": sum(map(len, prompts)),
        "prompts": len(prompts),
        "seed": seed,
        "warnings": list(own.warnings),
        "cards": cards,
    }


@dataclass(frozen=True)
class _Maker:
    model: TracedModel
    readings: Readings
    lens: LogitLens
    bos: bool
    seed: int

    @torch.no_grad()
    def card(self, feature: Feature, values: Tensor) -> dict[str, Any]:
        """The card of one feature, whose activations at all tokens are ``values``."""
        random = feature.direction is not None
        name = latent_name(feature.site, feature.latent, feature.dictionary.n)
        told: dict[str, Any] = {
            "name": name,
            "site": str(feature.site),
            "latent": feature.latent,
            "kind": "random direction" if random else "latent",
            "density": density_facts(self.readings, values),
            "lens": self.lens.ends(feature.written),
        }
        if random:
            told["threshold"] = feature.threshold
        if not told["density"]["active"]:
            return told
        top = int(values.argmax())
        generator = _generator(feature, self.seed, 1 + random)
        pool = torch.cat([ids[int(self.bos) :] for ids in self.readings.prompts])
        prompt = until(self.readings, top)
        model, readings = self.model, self.readings
        return told | {
            "histogram": histogram(values),
            "top": excerpt(model, readings, values, top),
            "bins": draw_examples(model, readings, values, generator),
            "ablations": token_ablations(model, feature, prompt, pool, generator, bos=self.bos),
            "context": context_dependence(
                model, feature, readings, values, generator, bos=self.bos
            ),
        }


def _control(feature: Feature, seed: int) -> Feature:
    """A random direction at the site of a latent; its threshold is still to come."""
    written = feature.dictionary.W_d
    normal = torch.randn(
        written.shape[1], generator=_generator(feature, seed, 0), dtype=torch.float64
    )
    direction = functional.normalize(normal, dim=0).to(written.device, written.dtype)
    return replace(feature, direction=direction)


def _threshold(projected: Tensor, active: int) -> float:
    """What as many tokens exceed, fewer where several are equal; below all, if all do."""
    ordered = projected.sort(descending=True).values
    if active < len(ordered):
        return float(ordered[active])
    return float(torch.nextafter(ordered[-1], ordered[-1] - 1))


def _generator(feature: Feature, seed: int, purpose: int) -> torch.Generator:
    site = int.from_bytes(str(feature.site).encode(), "big")
    return generator_of(seed, _CARDS, site, feature.latent, purpose)
