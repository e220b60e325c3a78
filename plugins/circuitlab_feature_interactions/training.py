"""Training: the dictionaries of all sites together, with their interactions kept few."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import (
    Dictionary,
    DictionaryInfo,
    DictionaryStats,
    NumericsError,
    OptionError,
    Site,
    track,
)
from circuitlab_feature_interactions.activations import MIXED, ActivationSource, Batch, Place
from circuitlab_feature_interactions.coupling import Coupling, Interactions
from circuitlab_feature_interactions.data import PromptStream, generator_of
from circuitlab_feature_interactions.dictionary_sets import (
    DictionarySet,
    read_facts,
    read_set,
    write_set,
)
from circuitlab_feature_interactions.learners import Learner
from circuitlab_feature_interactions.losses import (
    Moments,
    SiteLoss,
    begin_dictionary,
    begin_transcoder,
    check_transcoder,
    site_loss,
)
from circuitlab_feature_interactions.resampling import resample
from circuitlab_feature_interactions.settings import STEERED, TrainSettings, differences
from circuitlab_feature_interactions.sites import Pair, site_pairs, written_by
from circuitlab_feature_interactions.states import STATE, locked, read_state, write_state

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Of all steps: between two looks for dead latents, and until when there are any. A latent that
#: begins anew is active too often for a while, and the sparsity's weight has to settle after that.
RESAMPLED, LAST_RESAMPLED = 0.05, 0.5
#: Points of the history of a training.
POINTS = 100
#: Tokens, at most, at which trained dictionaries are measured, and how many at a time: enough to
#: call a latent dead.
CHECK, CHECK_BATCH = 50_000, 4096


@dataclass(eq=False)
class Trainer:
    """The training of all dictionaries of some pairs.

    A step minimises the sum over sites of :func:`losses.site_loss`, plus the interactions' weight
    times the sum of the pairs' interactions. All that is drawn at random follows from the seed and
    the number of the step, so that a training that goes on from a state ends as one that was not
    stopped.

    Attributes:
        settings: What to do.
        pairs: Pairs of sites.
        interactions: Of each pair; empty where they weigh nothing.
        learners: Of each site.
        done: Number of steps done.
        place: Where the next batch is.
        history: Lists of equal length: ``step``, of each site its ``r2`` (of what its dictionary
            writes) and ``l0`` at that step's tokens before the step, and, but for ``topk``, the
            weight of its sparsity term after it; of each pair its interactions in the unit of
            :func:`penalties.unit_of`.
    """

    settings: TrainSettings
    pairs: Sequence[Pair]
    interactions: Mapping[Pair, Interactions]
    learners: Mapping[Site, Learner]
    done: int = 0
    place: Place = field(default_factory=Place)
    history: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        settings: TrainSettings,
        pairs: Sequence[Pair],
        interactions: Mapping[Pair, Interactions],
        source: ActivationSource,
    ) -> Trainer:
        """A trainer that has done nothing; means and spreads are those of the first batches."""
        first, learners = _first_tokens(source), {}
        for number, (site, target) in enumerate(written_by(pairs).items()):
            moments, read = Moments.of(first[target], target), None
            generator = generator_of(settings.seed, -1, number)
            if target == site:
                dictionary = begin_dictionary(settings, moments, generator)
            else:
                read = Moments.of(first[site], site)
                dictionary = begin_transcoder(
                    settings, first[site], first[target], moments, generator
                )
            rate, sparsity = settings.rate_of(dictionary.n), settings.steering()
            learners[site] = Learner.of(dictionary, moments, rate, sparsity, read)
        return cls(settings, pairs, interactions, learners)

    def steps(self, source: ActivationSource) -> Iterator[int]:
        """Do the steps that are left; after each, its number, counted from 1.

        Raises:
            NumericsError: the loss is not finite.
        """
        if self.done == self.settings.steps:
            return
        for batch, after in source.batches(self.place):
            self._step(batch)
            self.done, self.place = self.done + 1, after
            yield self.done
            if self.done == self.settings.steps:
                return

    def _step(self, batch: Batch) -> None:
        step, settings, written = self.done, self.settings, written_by(self.pairs)
        losses = {
            site: site_loss(
                learner.dictionary,
                batch.flat(site),
                learner.moments,
                learner.sparsity.weight,
                batch.flat(written[site]) if learner.read else None,
            )
            for site, learner in self.learners.items()
        }
        for site, learner in self.learners.items():
            learner.note(losses[site].z)
            if step < STEERED * settings.steps:
                learner.sparsity.note(losses[site].l0)
        penalties = self._penalties(batch) if self.interactions else {}
        total = torch.stack([loss.total for loss in losses.values()]).sum()
        if penalties:
            weight = settings.weight_at(step)
            total = total + weight * torch.stack(list(penalties.values())).sum()
        if not torch.isfinite(total):
            worst = next((s for s, loss in losses.items() if not loss.total.isfinite()), None)
            where = f"of {worst}" if worst else "of the interactions"
            raise NumericsError(
                f"the loss {where} is not finite at step {step + 1}; lower --learning-rate or "
                f"--strength"
            )
        total.backward()  # type: ignore[no-untyped-call]  # torch's own
        for learner in self.learners.values():
            learner.step(settings.rate_share(step))
        self._resample(step, losses, batch)
        if step % max(1, settings.steps // POINTS) == 0 or step + 1 == settings.steps:
            self._record(step, losses, penalties)

    def _penalties(self, batch: Batch) -> dict[Pair, Tensor]:
        found = {}
        for number, (pair, measure) in enumerate(self.interactions.items()):
            target = self.learners[pair.target]
            found[pair] = measure(
                self.learners[pair.source].dictionary,
                target.dictionary,
                batch,
                target.scale,
                generator_of(self.settings.seed, self.done, number),
            )
        return found

    def _resample(self, step: int, losses: Mapping[Site, SiteLoss], batch: Batch) -> None:
        settings = self.settings
        every = max(25, round(RESAMPLED * settings.steps))
        if (step + 1) % every or step + 1 > LAST_RESAMPLED * settings.steps:
            return
        for number, (site, learner) in enumerate(self.learners.items()):
            # Nothing of it in all steps since the last look.
            dead = learner.silent >= every * settings.batch_tokens
            if dead.any():
                resample(
                    learner.dictionary,
                    learner.optimiser,
                    dead,
                    losses[site].error,
                    learner.moments,
                    settings.k,
                    generator_of(settings.seed, step, -2, number),
                    (batch.flat(site), learner.read.mean) if learner.read else None,
                )
                learner.silent[dead] = 0

    def _record(
        self, step: int, losses: Mapping[Site, SiteLoss], penalties: Mapping[Pair, Tensor]
    ) -> None:
        values: dict[str, float] = {"step": float(step)}
        settings = self.settings
        for site, loss in losses.items():
            values |= {f"r2 {site}": 1 - loss.missed, f"l0 {site}": loss.l0}
            if settings.arch != "topk":
                values[f"sparsity {site}"] = self.learners[site].sparsity.weight
        for pair, penalty in penalties.items():
            values[f"interactions {pair}"] = float(penalty.detach())
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)

    # --- state ------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and plain facts: all that :meth:`load` needs."""
        tensors = {
            f"{site}/{name}": tensor
            for site, learner in self.learners.items()
            for name, tensor in learner.state().items()
        }
        for pair, measure in self.interactions.items():
            tensors |= {f"{pair}/{name}": value for name, value in measure.state().items()}
        facts = {
            "done": self.done,
            "place": [self.place.prompt, self.place.batch],
            "history": self.history,
        }
        return tensors, facts

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave for the same settings and data."""
        kept: dict[str, Learner | Interactions] = {}
        kept |= {f"{site}/": learner for site, learner in self.learners.items()}
        kept |= {f"{pair}/": measure for pair, measure in self.interactions.items()}
        for prefix, learned in kept.items():
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            learned.load(own)
        self.done = int(facts["done"])
        self.place = Place(*map(int, facts["place"]))
        self.history = {name: list(values) for name, values in facts["history"].items()}


def _activations(pairs: Sequence[Pair]) -> list[Site]:
    """All sites that dictionaries of the pairs read or write, in the order of execution."""
    written = written_by(pairs)
    return sorted({*written, *written.values()})


def _first_tokens(source: ActivationSource) -> dict[Site, Tensor]:
    """Values of each site at the first prompts, ``[n, width]``."""
    batches: list[Batch] = []
    for batch, after in source.batches():
        batches.append(batch)
        if after.prompt:
            break
    return {site: torch.cat([batch.flat(site) for batch in batches]) for site in source.sites}


def train(
    model: TracedModel,
    settings: TrainSettings,
    folder: Path,
    *,
    coupled: Callable[[TracedModel, Pair, TrainSettings], Interactions] = Coupling,
) -> DictionarySet:
    """Train the dictionaries of a model's sites, into a folder.

    A folder that holds an unfinished training of the same settings, model and data is gone on with,
    and ends with the same numbers; one that holds a finished one is read.

    Args:
        model: Whose activations.
        settings: How.
        folder: Made where it is not there.
        coupled: Gives the interactions of a pair.

    Raises:
        OptionError: a setting does not fit, there is no transcoder of that architecture, the folder
            is in use, or it holds a training of other settings; those that differ are named.
        SiteError: the model has no such layer.
        TaskError: a text cannot be read.
        ModelError: the model has no corpus, its activations do not vary, or a file is damaged.
        NumericsError: an activation or the loss is not finite.
        ResourceError: the folder cannot be written.
    """
    pairs = site_pairs(settings.sites, model)
    stream = PromptStream(model, settings.data, settings.context_length, settings.seed)
    settings.n_latents(model.d_model)  # refused before anything is run
    if any(pair.route == "transcoder" for pair in pairs):
        check_transcoder(settings)
    whole = any(pair.route != "mlp" for pair in pairs)
    source = ActivationSource(
        model, stream, _activations(pairs), settings.batch_tokens, whole=whole, seed=settings.seed
    )
    about = _about(model, settings, stream)
    with locked(folder):
        state, facts = read_state(folder), read_facts(folder)
        for earlier in (state[1] if state else None, facts):
            if earlier is not None and earlier["about"] != about:
                raise OptionError(
                    f"folder '{folder}' holds a training of other settings: "
                    f"{differences(earlier['about'], about)}; go back to those, name another "
                    f"--output, or delete the folder"
                )
        if state is None and facts is not None:
            return read_set(folder, model)
        terms = {pair: coupled(model, pair, settings) for pair in pairs if settings.penalised}
        trainer = Trainer.begin(settings, pairs, terms, source)
        if state is not None:
            trainer.load(*state)
        steps, done = trainer.steps(source), trainer.done
        for step in track(steps, "training dictionaries", total=settings.steps, done=done):
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                tensors, own = trainer.state()
                write_state(folder, tensors, own | {"about": about})
        return _finish(model, trainer, stream, folder, about)


def _about(model: TracedModel, settings: TrainSettings, stream: PromptStream) -> dict[str, Any]:
    """What the numbers of a training depend on, as plain JSON."""
    embedding = model.weights.embedding(model.dtype).cpu().contiguous()
    weights = hashlib.sha256(embedding.view(torch.uint8).numpy().data).hexdigest()
    kept = settings.to_json()
    del kept["checkpoint_every"], kept["data"]
    found = {"model": model.name, "revision": model.revision, "dtype": str(model.dtype)}
    return found | {"embedding": weights[:16]} | kept | stream.facts()


def _finish(
    model: TracedModel,
    trainer: Trainer,
    stream: PromptStream,
    folder: Path,
    about: Mapping[str, Any],
) -> DictionarySet:
    """Measure the dictionaries, write the set, and take the state away."""
    dictionaries, written = {}, written_by(trainer.pairs)
    for site, learner in trainer.learners.items():
        dictionary = learner.dictionary.requires_grad_(False)
        dictionary.info = DictionaryInfo(
            site=str(site),
            target=str(written[site]) if dictionary.transcoder else None,
            model=model.name,
            revision=model.revision,
            training={"trainer": "circuitlab dict train", "settings": dict(about)},
            **stream.facts(),
        )
        dictionaries[site] = dictionary
    info = {
        "about": dict(about),
        "history": trainer.history,
        "parameters": {
            str(site): sum(parameter.numel() for parameter in dictionary.parameters())
            for site, dictionary in dictionaries.items()
        },
        "notes": [measure.note for measure in trainer.interactions.values() if measure.note],
        "statistics": measure(model, dictionaries, stream, trainer),
    }
    found = DictionarySet(dictionaries, trainer.pairs, info)
    write_set(found, folder)
    (folder / STATE).unlink(missing_ok=True)
    return found


def measure(
    model: TracedModel,
    dictionaries: Mapping[Site, Dictionary],
    stream: PromptStream,
    trainer: Trainer,
) -> dict[str, Any]:
    """Each dictionary's :class:`circuitlab.DictionaryStats`, at prompts after the training's.

    Returns:
        By site; ``held_out`` is False where the data had to begin again.
    """
    settings = trainer.settings
    trained = settings.steps * settings.batch_tokens
    # A prompt has a token or more, so the last mix ends before this one.
    first = trainer.place.prompt + MIXED * settings.batch_tokens
    written = written_by(trainer.pairs)
    source = ActivationSource(model, stream, _activations(trainer.pairs), CHECK_BATCH, whole=True)
    stats = {site: DictionaryStats(dictionary.n) for site, dictionary in dictionaries.items()}
    for batch, _ in source.batches(Place(first)):
        for site, dictionary in dictionaries.items():
            x, target = batch.values[site], batch.values[written[site]]
            stats[site].add(
                target,
                dictionary.active(x),
                dictionary(x),
                positions=batch.positions,
                mask=batch.mask,
            )
        if min(stat.tokens for stat in stats.values()) >= min(CHECK, max(1, trained // 10)):
            break
    found: dict[str, Any] = {str(site): stat.summary() for site, stat in stats.items()}
    return found | {"held_out": stream.repeats is None}
