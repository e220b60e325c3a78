"""Shards: one run's work done in parts by several processes, put together again as one state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab.checkpoint import StateFile, active, changes
from circuitlab.errors import OptionError, TaskError

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.registry import Analysis


class ShardDone(BaseException):
    """A shard has done its parts; what an analysis makes of all parts is not for it.

    No error, and no ``except Exception`` may stop it.
    """


@contextmanager
def sharded() -> Iterator[None]:
    """Stages inside can be done in shards: each shard does the parts that ``share`` gives it.

    A run that is a shard ends where the block ends. When all shards are put together, the block is
    gone through again with every part done, and the analysis goes on behind it. So what is inside
    may not look at values that are NaN. In a whole run this does nothing.

    Example:
        >>> import torch
        >>> from circuitlab import Checkpoint
        >>> with sharded(), Checkpoint("squares") as saved:
        ...     state = saved.load() or {"squares": torch.full((4,), torch.nan)}
        ...     for row in saved.share(range(4)):
        ...         if state["squares"][row].isnan():
        ...             state["squares"][row] = row**2
        ...             saved.keep(state)
        >>> state["squares"].tolist()
        [0.0, 1.0, 4.0, 9.0]
    """
    file = active()
    if file is None or file.shard is None:
        yield
        return
    file.sharing = True
    try:
        yield
    finally:
        file.sharing = False
    file.finish_shard()
    raise ShardDone


def check_shards(
    analysis: Analysis, options: Mapping[str, Any], installed: Iterable[Analysis]
) -> None:
    """Refuse to split what cannot be split.

    Args:
        analysis: The analysis.
        options: Those of its options that are given.
        installed: All analyses, to name those that can be split.

    Raises:
        OptionError: the analysis cannot be split, or not with these options.
    """
    if analysis.shards is None:
        able = sorted(other.name for other in installed if other.shards is not None)
        raise OptionError(
            f"analysis {analysis.name!r} cannot be split into shards; leave --shard out; those "
            f"that can: {', '.join(able) or 'none installed'}"
        )
    for option in analysis.options:
        given = options.get(option.name, option.default)
        needed = analysis.shards.get(option.name, given)
        values = needed if isinstance(needed, tuple) else (needed,)
        if given not in values:
            raise OptionError(
                f"analysis {analysis.name!r} can be split into shards with {option.flag} "
                f"{' or '.join(map(str, values))}, not with {given}; leave --shard out"
            )


def merge(into: StateFile, paths: Sequence[Path]) -> None:
    """Fill the state of a whole run, which has none yet, with those of all its shards.

    Args:
        into: The state of the whole run, open.
        paths: States of the shards, in their order.

    Raises:
        TaskError: a shard is missing, not complete, damaged, or of a run with other settings; or
            the shards together do not have each value exactly once.
        OptionError: a shard is still running.
    """
    shards = []
    for number, path in enumerate(paths, start=1):
        with StateFile(path, (number, len(paths))) as shard:
            shards.append(shard)
        if not shard.complete:
            fact = "is not complete" if shard.found else "has not been run"
            raise TaskError(
                f"shard {number} of {len(paths)} {fact}: run it again with the same command, or "
                f"circuitlab runs resume {str(path.parent)!r}"
            )
        if shard.settings != shards[0].settings:
            raise TaskError(
                f"shard {number} of {len(paths)} is of another run than shard 1: "
                f"{changes(shards[0].settings, shard.settings)}; delete {str(path)!r} and run it "
                f"again"
            )
    stages = dict.fromkeys(stage for shard in shards for stage in shard.kept)
    into.settings, into.found = shards[0].settings, True
    into.seconds = sum(shard.seconds for shard in shards)
    into.kept = {stage: _merge_stage(stage, shards) for stage in stages}


def _merge_stage(stage: str, shards: Sequence[StateFile]) -> dict[str, dict[str, Tensor]]:
    import torch

    parts = [shard.kept[stage] for shard in shards if stage in shard.kept]
    first = parts[0]
    for kind in ("state", "random"):
        shapes = {tuple((k, v.shape, v.dtype) for k, v in part[kind].items()) for part in parts}
        if len(shapes) > 1:
            raise TaskError(f"shards do not agree on what stage {stage!r} keeps; run them again")
    for part in parts:
        if not all(torch.equal(part["random"][k], v) for k, v in first["random"].items()):
            raise TaskError(
                f"shards drew different random numbers in stage {stage!r}; its analysis may draw "
                f"none where it is split"
            )
    whole = {name: tensor.clone() for name, tensor in first["state"].items()}
    for name, values in whole.items():
        for part in parts[1:]:
            new = ~part["state"][name].isnan()
            if (new & ~values.isnan()).any():
                raise TaskError(f"two shards have done the same parts of stage {stage!r}")
            values[new] = part["state"][name][new]
        if missing := int(values.isnan().sum()):
            raise TaskError(
                f"all shards together lack {missing:,} of {values.numel():,} values of stage "
                f"{stage!r}; its analysis did not share its parts"
            )
    return {"state": whole, "random": first["random"]}
