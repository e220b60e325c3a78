"""Single paths: the exact effect of each, and the search for the strongest.

A path patch recomputes only the nodes on the path (Goldowsky-Dill et al. 2023, arXiv:2304.05969):
the first component writes its other output; each later one reads the base stream plus the change of
the one before it, through the ports the path names, with its norm recomputed; the last is where the
metric is read. A path that ends at another component than ``logits`` changes that component's
output, and everything after it is recomputed: a path of one edge is that edge patched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from circuitlab import GraphError, OptionError, choose_batch_size, track
from circuitlab_path_patching.measures import stronger, strongest
from circuitlab_path_patching.paths.language import PORTS, Path
from circuitlab_path_patching.paths.trees import KEPT_MEMORY, chunks, row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Mode, Wiring
    from circuitlab_path_patching.effects import Setting

#: Up to this number, all paths are patched.
LIMIT = 20_000
#: Of more, paths that the beam search patches at each step.
BEAM = 5_000


def path_effects(setting: Setting, paths: Sequence[Path]) -> dict[Mode, Tensor]:
    """Exact effect of each path alone, per pair.

    The cost grows with the number of different beginnings of the paths, not with forward passes.

    Returns:
        For each mode ``[n_paths, n_pairs]``, float64; negative helps. In mode ``noise`` metric(path
        patched) - metric(clean), in mode ``denoise`` metric(corrupt) - metric(path patched).

    Raises:
        GraphError: a path does not run forward in the model.
        OptionError: mode ``denoise`` with another ablation than ``counterfactual``.
        NumericsError: an activation is not finite.
    """
    model, pairs = setting.model, setting.pairs
    # Sorted, paths with the same beginning come together and share it.
    order = sorted(range(len(paths)), key=lambda number: paths[number].nodes)
    size = choose_batch_size(model, pairs, setting.batch_size)
    n_nodes = KEPT_MEMORY // row_bytes(model, min(size, len(pairs)), pairs.clean.ids.shape[1])
    work = list(chunks(model.wiring, [[paths[number]] for number in order], n_nodes))
    effects: dict[Mode, Tensor] = {}
    for mode in setting.modes:
        sign = 1 if mode == "noise" else -1
        found = torch.zeros(len(paths), len(pairs), dtype=torch.float64)
        first = 0
        for patcher in replace(setting, batch_size=size).patchers(mode):
            columns = slice(first, first + len(patcher))
            for trees, part in track(work, f"patching {len(paths):,} paths"):
                scores = trees.scores(patcher) - patcher.base_score
                found[order[part], columns] = sign * scores.cpu()
            first = columns.stop
        effects[mode] = found
    return effects


@dataclass(frozen=True)
class PathEffects:
    """Paths and what each one does alone.

    Attributes:
        paths: The paths.
        effects: For each mode ``[n_paths, n_pairs]``, see :func:`path_effects`.
        method: Which paths these are.
        warnings: What the search did not see.
    """

    paths: tuple[Path, ...]
    effects: Mapping[Mode, Tensor]
    method: str
    warnings: tuple[str, ...] = ()

    def order(self) -> list[int]:
        """Numbers of the paths, strongest first; of two modes the larger effect counts."""
        names = [str(path) for path in self.paths]
        return strongest(stronger(self.effects).tolist(), names, "all", None)


def named_paths(setting: Setting, paths: Sequence[Path]) -> PathEffects:
    """The effects of these paths, see :func:`path_effects`."""
    method = f"exact, {len(paths):,} named path{'s' * (len(paths) != 1)}"
    return PathEffects(tuple(paths), path_effects(setting, paths), method)


def strongest_paths(
    setting: Setting,
    *,
    senders: Sequence[str] = ("input",),
    max_hops: int | None = None,
    limit: int = LIMIT,
    beam: int = BEAM,
) -> PathEffects:
    """Paths to ``logits`` and their exact effects: all of them, or where they are many the best.

    Where there are more than ``limit``, a beam search runs backwards from ``logits``: the end of a
    path is patched from its first component on, which says what all paths that end so do together.
    Then the ends are made longer by one component, those of the largest effect first, ties by name,
    as far as ``beam`` reaches. So a strong path is missed where its ends are weak, as where
    parallel paths cancel.

    Args:
        setting: What is measured. With two modes an end or path counts by the one in which it does
            more; the ablation is what the first component of a path writes.
        senders: Where paths begin.
        max_hops: Most steps of a path; ``input>logits`` is one. None for any.
        limit: Most paths that are all patched.
        beam: Most paths that a beam search patches at each step; one end is always made longer.

    Returns:
        The paths, heads read through one port each, in no particular order.

    Raises:
        OptionError: ``max_hops`` is less than 1, or the ablation does not go with the mode.
        GraphError: a sender does not exist in the model.
    """
    if max_hops is not None and max_hops < 1:
        raise OptionError(f"--max-hops {max_hops}: a path has at least 1 step; give 1 or more")
    wiring = setting.model.wiring
    check_senders(wiring, senders)
    search = _Search(wiring, frozenset(senders))
    hops = 2 * setting.model.n_layers + 1 if max_hops is None else max_hops
    reach = f"from {', '.join(senders)}" + ("" if max_hops is None else f" of up to {hops} steps")
    paths = list(islice(search.paths(hops), limit + 1))
    if len(paths) <= limit:
        method = f"exact, all {len(paths):,} paths {reach}"
        return PathEffects(tuple(paths), path_effects(setting, paths), method)
    joined, effects = _beam(setting, search, hops, beam)
    method = f"exact, {len(joined):,} paths {reach} that a beam of {beam:,} met"
    warning = (
        f"there are more than {limit:,} paths {reach}: a beam search patched {len(joined):,} of "
        f"them; a strong path whose ends are weak was not seen. Fewer steps (--max-hops) or fewer "
        f"--senders are searched in full"
    )
    return PathEffects(joined, effects, method, (warning,))


# --- the search -----------------------------------------------------------------------------------

_END = Path((("logits", ""),))


class _Search:
    """Paths backwards: what can stand before the beginning of an end of a path."""

    def __init__(self, wiring: Wiring, senders: frozenset[str]) -> None:
        self.senders = senders
        self.first = min(wiring.source_rows[sender] for sender in senders)
        self.heard = {
            receiver.component: wiring.sources[: block.n_sources]
            for block in wiring.blocks()
            for receiver in wiring.receivers[block.receivers]
        }

    def begins(self, path: Path) -> bool:
        """Whether a path may begin where this one does."""
        return path.nodes[0][0] in self.senders

    def goes_on(self, path: Path) -> bool:
        """Whether a sender runs before the beginning of this path."""
        return len(self.heard.get(path.nodes[0][0], ())) > self.first

    def longer(self, end: Path) -> Iterator[Path]:
        """All that are longer by one component and lead on to a sender, in forward order."""
        (target, _), *rest = end.nodes
        for source in self.heard[target]:
            for port in PORTS if target.startswith("a") else ("",):
                path = Path(((source, ""), (target, port), *rest))
                if self.begins(path) or self.goes_on(path):
                    yield path

    def paths(self, hops: int, end: Path = _END) -> Iterator[Path]:
        """All paths from a sender that end so, of up to ``hops`` steps more."""
        for path in self.longer(end) if hops > 0 else ():
            if self.begins(path):
                yield path
            if self.goes_on(path):
                yield from self.paths(hops - 1, path)


def _beam(
    setting: Setting, search: _Search, hops: int, beam: int
) -> tuple[tuple[Path, ...], dict[Mode, Tensor]]:
    """The paths that a beam search meets, and their effects."""
    complete: list[PathEffects] = []
    ends = [_END]
    for left in reversed(range(hops)):
        longer: list[Path] = []
        for end in ends:
            more = [path for path in search.longer(end) if left or search.begins(path)]
            if longer and len(longer) + len(more) > beam:
                break
            longer += more
        if not longer:
            break
        found = named_paths(setting, longer)
        done = [n for n, path in enumerate(found.paths) if search.begins(path)]
        complete.append(_rows(found, done))
        ranked = [found.paths[number] for number in found.order()]
        ends = [path for path in ranked if search.goes_on(path)]
    joined = tuple(path for part in complete for path in part.paths)
    effects = {
        each: torch.cat([part.effects[each] for part in complete]) for each in complete[0].effects
    }
    return joined, effects


def check_senders(wiring: Wiring, senders: Sequence[str]) -> None:
    """Refuse what cannot begin a path.

    Raises:
        GraphError: a name is not one of a component that writes.
        OptionError: there is no name.
    """
    for sender in senders:
        if sender not in wiring.source_rows:
            wiring.component(sender)
            raise GraphError(f"sender {sender!r} writes nothing; name input, heads or MLPs")
    if not senders:
        raise OptionError("no sender is named; give one, as in --senders input")


def _rows(found: PathEffects, numbers: Sequence[int]) -> PathEffects:
    effects = {mode: values[list(numbers)] for mode, values in found.effects.items()}
    return PathEffects(tuple(found.paths[n] for n in numbers), effects, found.method)
