"""Comparing: sets of dictionaries on the same prompts, at equal reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from circuitlab import DictionaryInfo, OptionError, Tokens
from circuitlab_feature_interactions.data import PromptStream, seed_of
from circuitlab_feature_interactions.dictionary_sets import SET, DictionarySet, read_set
from circuitlab_feature_interactions.evaluating import (
    EVALUATION,
    Measured,
    draw,
    make_batches,
    measure,
)
from circuitlab_feature_interactions.frontier import (
    Drawn,
    Group,
    at_reconstruction,
    differences,
    frontier,
    group_sets,
)
from circuitlab_feature_interactions.intervals import (
    GROUPS,
    draw_groups,
    draw_prompts,
    interval_of,
)

if TYPE_CHECKING:
    from circuitlab import TracedModel

By = Literal["r2", "kl", "ce"]

MEANS = {
    "r2": "centred R²",
    "kl": "share of the divergence from zeroing that is recovered",
    "ce": "share of the loss from zeroing that is recovered",
}
#: Settings of the penalty; without one they say nothing.
_PENALTY = ("interaction", "strength", "estimator", "warmup")
#: What settings do not differ in: the seed is drawn, and where a set is does not matter.
_NO_SETTING = ("seed", "model", "revision", "dtype", "embedding", "data")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Settings side by side.

    Attributes:
        groups: All settings.
        by: Name of the number that says how much is reconstructed.
        independent: The frontier of those without a penalty.
        penalised: The frontier of those with one.
    """

    groups: Sequence[Group]
    by: By
    independent: Sequence[Group]
    penalised: Sequence[Group]

    @classmethod
    def of(cls, sets: Sequence[Drawn], by: By) -> Comparison:
        """Group the sets and find both frontiers.

        Raises:
            OptionError: there is no set with a penalty, or none without; a training is there twice;
            or a number is missing.
        """
        groups = group_sets(sets)
        for group in groups:
            if len(set(group.seeds)) < len(group.seeds):
                raise OptionError(
                    f"two sets of dictionaries are the same training, '{group.setting}' of seed "
                    f"{max(group.seeds, key=group.seeds.count)}; name one of them"
                )
        for group in groups:
            if by not in group.numbers:
                raise OptionError(
                    f"--reconstruction {by} cannot be told of '{group.setting}': zero in a site's "
                    f"place does not harm the model; use r2 or kl"
                )
        kinds = [[g for g in groups if g.penalised == wanted] for wanted in (False, True)]
        for kind, own in zip(("none", "l1"), kinds, strict=True):
            if not own:
                raise OptionError(
                    f"of the sets of dictionaries none was trained with"
                    f"{'out' if kind == 'none' else ''} a penalty; name one (circuitlab dict train "
                    f"--interaction {kind})"
                )
        return cls(groups, by, *(frontier(own, by) for own in kinds))

    @property
    def names(self) -> list[str]:
        """Numbers that every setting has."""
        first = self.groups[0].numbers
        return [name for name in first if all(name in group.numbers for group in self.groups)]

    def at_equal(self, group: Group) -> dict[str, Tensor]:
        """A setting less the independent ones at its reconstruction, ``[draws]`` by name."""
        wanted = group.numbers[self.by]
        return differences(group, at_reconstruction(wanted, self.independent, self.by, self.names))

    def at_same_settings(self, group: Group) -> dict[str, Tensor] | None:
        """A setting less the one that differs in the penalty alone; None where there is none."""
        same = [g for g in self.groups if not g.penalised and g.base == group.base]
        if not same:
            return None
        return differences(group, {name: same[0].numbers[name] for name in self.names})


def tell(numbers: Mapping[str, Tensor]) -> dict[str, Any]:
    """Each number and its 95 % interval, plain JSON; what has no number is left out."""
    found: dict[str, Any] = {}
    for name, values in numbers.items():
        if bool(values[0].isfinite()):
            found[name] = float(values[0])
            if (ends := interval_of(values)) is not None and ends[0] < ends[1]:
                found[f"{name}_interval"] = list(ends)
    return found


# --- sets -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """Sets of dictionaries, and fresh prompts to measure them on.

    Attributes:
        model: The model.
        sets: By folder.
        batches: Prompts.
        fitting: Others, for baselines.
        warnings: How training and use differ, one sentence each.
    """

    model: TracedModel
    sets: Mapping[Path, DictionarySet]
    batches: Sequence[Tokens]
    fitting: Sequence[Tokens]
    warnings: Sequence[str]

    @classmethod
    def read(
        cls,
        model: TracedModel,
        folders: Sequence[Path],
        data: Path | None,
        n_tokens: int,
        context_length: int | None,
        seed: int,
    ) -> Bench:
        """Read the sets and draw the prompts, those of ``dict eval`` with the same seed.

        Raises:
            OptionError: ``n_tokens`` is below 1, or the sets are not of the same pairs of sites.
            ModelError: a folder holds no set, or the model has no corpus.
        """
        if n_tokens < 1:
            raise OptionError(f"--n-tokens {n_tokens} is too small; give 1 or more")
        stream = PromptStream(model, data, context_length, seed_of(seed, EVALUATION))
        use = DictionaryInfo(**stream.facts())
        sets = {folder: read_set(folder, model, use) for folder in folders}
        pairs = {folder: ", ".join(map(str, one.pairs)) for folder, one in sets.items()}
        for folder, sites in pairs.items():
            if sites != pairs[folders[0]]:
                raise OptionError(
                    f"set '{folder}' is of {sites} and '{folders[0]}' of {pairs[folders[0]]}; "
                    f"compare sets of the same pairs of sites"
                )
        fresh, rows = draw(stream, n_tokens)
        _, others = draw(stream, n_tokens, first=fresh)
        warnings = [text for one in sets.values() for text in one.warnings]
        batches, fitting = make_batches(rows, model), make_batches(others, model)
        return cls(model, sets, batches, fitting, tuple(dict.fromkeys(warnings)))

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return sum(len(tokens.mask) for tokens in self.batches)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(int(tokens.mask.sum()) for tokens in self.batches)

    def drawn(self) -> list[Drawn]:
        """The numbers of every set in each draw of prompts."""
        names = name_settings([one.info.get("about", {}) for one in self.sets.values()])
        found = []
        for (folder, one), (setting, base) in zip(self.sets.items(), names, strict=True):
            about = one.info.get("about", {})
            if "interaction" not in about or "seed" not in about:
                raise OptionError(
                    f"set '{folder}' does not say how it was trained, and cannot be compared; "
                    f"train it with circuitlab dict train"
                )
            measured = measure(self.model, one.pairs, one.dictionaries, self.batches)
            numbers = numbers_of(measured, self.prompts)
            found.append(Drawn(setting, base, _penalised(about), int(about["seed"]), numbers))
        return found


def numbers_of(measured: Measured, n_prompts: int) -> dict[str, Tensor]:
    """All numbers of a set of dictionaries in each draw of prompts.

    Returns:
        ``[draws]`` by name: ``r2``, ``kl``, ``ce`` and ``l0``, means over sites, where every site
        has them, and by site as ``r2 mlp_in.0``; and those of :meth:`sparsity.Sparsity.numbers`,
        means over pairs.
    """
    prompts, groups = draw_prompts(n_prompts), draw_groups(min(n_prompts, GROUPS))
    by_site = {str(site): sums.numbers(prompts) for site, sums in measured.sites.items()}
    for site, sums in measured.sites.items():
        by_site[str(site)]["l0"] = torch.full_like(
            by_site[str(site)]["r2"], sums.activity.stats.summary()["l0"]
        )
    found = _means(list(by_site.values()))
    for site_name, numbers in by_site.items():
        found |= {f"{name} {site_name}": values for name, values in numbers.items()}
    return found | _means([sums.numbers(groups) for sums in measured.pairs.values()])


def name_settings(abouts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A short name of each training's settings, and of those without the penalty's.

    Only what differs between some two of them is named, and the penalty.
    """
    facts = [
        {k: v for k, v in about.items() if k not in _NO_SETTING and (k not in _PENALTY)}
        for about in abouts
    ]
    names = list(dict.fromkeys(name for own in facts for name in own))
    varying = [name for name in names if len({repr(own.get(name)) for own in facts}) > 1]
    sampled = {a.get("estimator") for a in abouts if _penalised(a)}
    warmups = {a.get("warmup") for a in abouts if _penalised(a)}
    found = []
    for about, own in zip(abouts, facts, strict=True):
        base = ", ".join(f"{name.replace('_', ' ')} {_short(own.get(name))}" for name in varying)
        penalty = "independent"
        if _penalised(about):
            penalty = f"{about['interaction']} {_short(about['strength'])}"
            penalty += f" {about['estimator']}" if len(sampled) > 1 else ""
            penalty += f" warmup {_short(about['warmup'])}" if len(warmups) > 1 else ""
        found.append((f"{penalty}, {base}" if base else penalty, base))
    return found


def find_folders(text: str) -> list[Path]:
    """The folders that a text names, with commas between them; a folder of sets stands for all.

    Raises:
        OptionError: a folder holds no set, or one is named twice.
    """
    found: list[Path] = []
    for name in (part.strip() for part in text.split(",")):
        folder = Path(name)
        own = (
            [folder]
            if (folder / SET).exists()
            else sorted(path.parent for path in folder.glob(f"*/{SET}"))
        )
        if not name or not own:
            raise OptionError(
                f"--dictionaries '{name}' holds no set of dictionaries; name folders that "
                f"circuitlab dict train wrote, or one with such folders in it"
            )
        found += own
    if len({path.resolve() for path in found}) < len(found):
        raise OptionError(f"--dictionaries {text!r} names a set twice; name each once")
    return found


def _penalised(about: Mapping[str, Any]) -> bool:
    return about.get("interaction", "none") != "none" and float(about.get("strength", 0)) > 0


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _means(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Means of the numbers that all have."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in names}
