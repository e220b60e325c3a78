"""The logic of a group of components: dividends, interactions and gate types of a mixture table.

A mixture table ``f`` is ``[2**k, n_pairs]``: the metric of each prompt pair in every mixture of the
group's ``k`` members. Bit ``i`` of the row says whether member ``i`` carries its clean value (1) or
its other, corrupt value (0): row 0 is all corrupt, the last row all clean. Values returned have the
metric's unit; positive means that the clean value of a member raises the metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from circuitlab import NumericsError, OptionError

if TYPE_CHECKING:
    from circuitlab import Interval

GateType = Literal["AND", "OR", "ADD", "XOR", "SOLE", "INERT", "MIXED"]
Others = Literal["average", "clean", "corrupt"]

MAX_MEMBERS = 8
#: Least adjusted R² with which a table is called by a template's name.
GOOD_FIT = 0.8
#: Adjusted R² that a less simple type must gain to be preferred. A second member with less than a
#: ninth of the first one's weight gains less, so the first one is then called SOLE.
MARGIN = 0.02
#: A table whose values differ by less than this share of the task's effect is flat.
FLAT = 0.01

_TWO_LEVEL: tuple[GateType, ...] = ("AND", "OR", "XOR")


@dataclass(frozen=True)
class Gate:
    """What a group of members computes, told from its mixture table.

    Attributes:
        type: ``AND``: the metric changes only when all members are clean. ``OR``: only when all are
            corrupt. ``XOR``: with the parity of the clean members. ``ADD``: by a fixed amount for
            each member. ``SOLE``: with one member alone. ``INERT``: not at all. ``MIXED``: none of
            these fits, as where one member must be clean and the other corrupt. A change may raise
            or lower the metric alike.
        fit: Adjusted R² of the type, of the best one for MIXED; pooled over pairs, at most 1.
        support: Share of bootstrap resamples of the pairs that give the same type.
        redundancy: 1 - (sum of the members' single noising effects) / (effect of all together).
            Positive: members stand in for one another (1 for OR). Negative: each one alone is
            enough to break it (1 - k for AND). None where the whole group's effect is flat.
        interaction: Mean :func:`interaction` of the members that change together, in metric units:
            positive for AND, negative for OR, 0 for ADD.
        member: Index of the member that carries everything, for SOLE.
        n_pairs: Pairs in which two members or more change; type and fit rest on these.
    """

    type: GateType
    fit: float
    support: float
    redundancy: float | None
    interaction: float
    member: int | None
    n_pairs: int


def dividends(f: Tensor) -> Tensor:
    """Harsanyi dividends (Möbius transform): what each set of members adds beyond its subsets.

    ``w[T] = sum over U in T of (-1)**(|T| - |U|) f[U]``, so that ``f[T]`` is the sum of ``w[U]``
    over the subsets U of T. Row 0 is the metric with all members corrupt. (Harsanyi 1963.)

    Returns:
        ``[2**k, n_pairs]``, float64, rows as in ``f``.

    Raises:
        OptionError: ``f`` has not 2**k rows, k from 1 to 8.
        NumericsError: ``f`` has a NaN or an infinity.
    """
    f, k = _checked(f)
    w = f.clone()
    for i in range(k):
        halves = _split(w, i)
        halves[:, 1] -= halves[:, 0]
    return w


def noising(f: Tensor) -> Tensor:
    """Loss when one member alone turns corrupt: ``[k, n_pairs]``, f(all) - f(all without i)."""
    f, k = _checked(f)
    return torch.stack([f[-1] - f[-1 - (1 << i)] for i in range(k)])


def denoising(f: Tensor) -> Tensor:
    """Gain when one member alone turns clean: ``[k, n_pairs]``, f(only i) - f(none)."""
    f, k = _checked(f)
    return torch.stack([f[1 << i] - f[0] for i in range(k)])


def shapley(f: Tensor) -> Tensor:
    """Shapley value of each member: ``[k, n_pairs]``; they sum to f(all) - f(none).

    Each dividend is shared equally by the members of its set. (Shapley 1953.)
    """
    w = dividends(f)
    k = _members(w)
    rows = torch.arange(len(w))
    bits = torch.stack([(rows >> i) & 1 for i in range(k)]).to(w.dtype)
    return (bits / bits.sum(0).clamp(min=1)) @ w


def interaction(f: Tensor, i: int, j: int, others: Others = "average") -> Tensor:
    """How much more members ``i`` and ``j`` do together than each by itself, ``[n_pairs]``.

    ``f(both) - f(only i) - f(only j) + f(neither)``, with the other members all ``clean``, all
    ``corrupt``, or on ``average`` over their 2**(k-2) states. The average is the Banzhaf
    interaction index (Grabisch & Roubens 1999); with the others corrupt it is the pair's Harsanyi
    dividend, of which the Shapley-Taylor index of order 2 is made (Dhamdhere et al. 2019,
    arXiv:1902.05622).

    Raises:
        OptionError: ``i`` and ``j`` are not two members of the group, or ``others`` is unknown.
    """
    f, k = _checked(f)
    if i == j or not (0 <= i < k and 0 <= j < k):
        raise OptionError(
            f"members {i} and {j} have no interaction in a group of {k}; name two different "
            f"members from 0 to {k - 1}"
        )
    rows = torch.arange(len(f))
    free = rows[((rows >> i) & 1 == 0) & ((rows >> j) & 1 == 0)]
    a, b = 1 << i, 1 << j
    values = f[free + a + b] - f[free + a] - f[free + b] + f[free]
    if others == "average":
        return values.mean(0)
    if others not in ("clean", "corrupt"):
        raise OptionError(
            f"state {others!r} of the other members is unknown; choose average, clean or corrupt"
        )
    return values[-1 if others == "clean" else 0]


def classify(
    f: Tensor, live: Tensor, *, scale: float, resamples: int = 1000, seed: int = 0
) -> Gate:
    """The gate type of a mixture table.

    Each type is a template that is fitted to each pair's table by least squares, up to an affine
    map of that pair's own: AND is 1 where all members are clean, OR is 0 where all are corrupt, XOR
    is the parity, SOLE is one member's bit (the same member in all pairs), ADD has a free weight
    for each member. Sums of squares are pooled over the pairs in which two members or more are
    live; members that are not live are left out of that pair's table.

    Types are compared by adjusted R², in which residual and total are divided by their degrees of
    freedom: noise then adds as much to each, so ADD, with k + 1 free numbers against 2, gains
    nothing by fitting it. Among types within ``MARGIN`` of the best the simplest is taken: SOLE,
    then AND, OR or XOR, then ADD. MIXED if none reaches ``GOOD_FIT``. No step divides by
    f(all) - f(none), which is 0 for XOR.

    Args:
        f: ``[2**k, n_pairs]``.
        live: ``[k, n_pairs]``, whether a member's other value differs from its clean one.
        scale: The task's effect in the metric's unit, of either sign; tables that vary by less
            than ``FLAT`` of it are INERT.
        resamples: Bootstrap resamples of the pairs.
        seed: Of the bootstrap.

    Raises:
        OptionError: a shape does not fit, or k is not from 1 to 8.
        NumericsError: ``f`` or ``scale`` is not finite.
    """
    f, k = _checked(f)
    live = live.to("cpu", torch.bool)
    if live.shape != (k, f.shape[1]):
        raise OptionError(
            f"live is {list(live.shape)} for a mixture table of {k} members and {f.shape[1]} "
            f"pairs; give [{k}, {f.shape[1]}]"
        )
    if not torch.isfinite(torch.tensor(scale)):
        raise NumericsError(f"scale {scale} of a mixture table is not finite; give a number")
    pooled = live.sum(0) >= 2
    n_pairs = int(pooled.sum())
    flat = FLAT * abs(scale)
    if not n_pairs:
        return _alone(f, live, flat)
    f, live = f[:, pooled], live[:, pooled]
    sums = _sums(f, live)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n_pairs, (resamples, n_pairs), generator=generator)
    counts = torch.zeros(resamples, n_pairs, dtype=f.dtype)
    counts.scatter_add_(1, draws, torch.ones_like(counts))
    types, fits, members = _choose(torch.cat([counts.new_ones(1, n_pairs), counts]), sums, k, flat)
    chosen = types[0]
    return Gate(
        type=chosen,
        fit=fits[0],
        support=types[1:].count(chosen) / max(1, resamples),
        redundancy=_redundancy(f, flat),
        interaction=_mean_interaction(f, live),
        member=members[0] if chosen == "SOLE" else None,
        n_pairs=n_pairs,
    )


def named_dividends(f: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Mean dividend of each set of members, small sets first; names are joined by ``+``."""
    w = dividends(f).mean(1).tolist()
    return {
        "+".join(names[i] for i in part): w[sum(1 << i for i in part)]
        for size in range(1, len(names) + 1)
        for part in combinations(range(len(names)), size)
    }


def table_rows(f: Tensor, intervals: Sequence[Interval | None]) -> list[list[str | float]]:
    """A mixture table as data: member bits, first member first; mean over pairs; its interval."""
    k, means = _members(f), f.mean(1).tolist()
    return [
        [format(row, f"0{k}b")[::-1], mean, *(between or (mean, mean))]
        for row, (mean, between) in enumerate(zip(means, intervals, strict=True))
    ]


class _Sums(NamedTuple):
    """Per pair: sums of squares about the templates and the mean, and their degrees of freedom.

    Columns of ``residual`` and ``freedom``, ``[n_pairs, k + 4]``: SOLE of each member, the types of
    ``_TWO_LEVEL``, ADD. The others are ``[n_pairs]``; ``spread`` is the squared range.
    """

    residual: Tensor
    freedom: Tensor
    total: Tensor
    total_freedom: Tensor
    spread: Tensor


def _sums(f: Tensor, live: Tensor) -> _Sums:
    k, n_pairs = live.shape
    columns = k + len(_TWO_LEVEL) + 1
    residual, freedom = f.new_zeros(n_pairs, columns), f.new_zeros(n_pairs, columns)
    total, total_freedom = f.new_zeros(n_pairs), f.new_zeros(n_pairs)
    for members, pairs in _patterns(live):
        table = f[_rows_of(members, k)][:, pairs]
        table = table - table.mean(0)
        total[pairs] = (table**2).sum(0)
        total_freedom[pairs] = len(table) - 1
        for column, template in enumerate(_templates(members, k)):
            residual[pairs, column] = _residual(table, template)
            freedom[pairs, column] = len(table) - 1 - template.shape[1]
    return _Sums(residual, freedom, total, total_freedom, (f.amax(0) - f.amin(0)) ** 2)


def _patterns(live: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Each set of members that are live together, and the pairs in which exactly these are."""
    columns = [tuple(column) for column in live.T.tolist()]
    for pattern in sorted(set(columns)):
        pairs = torch.tensor([pair for pair, column in enumerate(columns) if column == pattern])
        yield [i for i, is_live in enumerate(pattern) if is_live], pairs


def _rows_of(members: list[int], k: int) -> list[int]:
    """Rows of the table of ``members`` alone, the others clean: they change nothing."""
    rest = sum(1 << i for i in range(k) if i not in members)
    return [
        rest + sum(1 << i for bit, i in enumerate(members) if row >> bit & 1)
        for row in range(1 << len(members))
    ]


def _templates(members: list[int], k: int) -> list[Tensor]:
    """Centred regressors ``[2**len(members), free weights]`` in the columns' order.

    A SOLE member that is not live explains nothing: its regressor is 0.
    """
    n = len(members)
    rows = torch.arange(1 << n)
    bits = torch.stack([(rows >> i) & 1 for i in range(n)], 1).double()
    sole = [
        bits[:, [members.index(i)]] if i in members else torch.zeros(1 << n, 1).double()
        for i in range(k)
    ]
    two_level = {
        "AND": bits.prod(1, keepdim=True),
        "OR": bits.amax(1, keepdim=True),
        "XOR": bits.sum(1, keepdim=True) % 2,
    }
    templates = [*sole, *(two_level[name] for name in _TWO_LEVEL), bits]
    return [template - template.mean(0) for template in templates]


def _residual(table: Tensor, template: Tensor) -> Tensor:
    """Sum of squares that the regressors leave, ``[pairs]``; both are centred."""
    # Bits, and every single template, are orthogonal columns: each weight is found by itself.
    norms = (template**2).sum(0).clamp(min=torch.finfo(template.dtype).tiny)
    weights = (template.T @ table) / norms[:, None]
    return ((table - template @ weights) ** 2).sum(0)


def _choose(
    counts: Tensor, sums: _Sums, k: int, flat: float
) -> tuple[list[GateType], list[float], list[int]]:
    """Type, adjusted R² and best SOLE member of each resample; ``counts`` is ``[n, n_pairs]``."""
    left = (counts @ sums.residual) / (counts @ sums.freedom)
    whole = (counts @ sums.total) / (counts @ sums.total_freedom)
    adjusted = 1 - left / whole.clamp(min=torch.finfo(whole.dtype).tiny)[:, None]
    is_flat = ((counts @ sums.spread) / counts.sum(1)).sqrt() <= flat
    sole, member = adjusted[:, :k].max(1)
    level, which = adjusted[:, k:-1].max(1)
    best = adjusted.amax(1)
    enough = (best - MARGIN).clamp(min=GOOD_FIT)
    types: list[GateType] = []
    fits = []
    for row in range(len(counts)):
        threshold = float(enough[row])
        kind: GateType = "MIXED"
        fit = float(best[row])
        if is_flat[row]:
            kind, fit = "INERT", 1.0
        elif sole[row] >= threshold:
            kind, fit = "SOLE", float(sole[row])
        elif level[row] >= threshold:
            kind, fit = _TWO_LEVEL[int(which[row])], float(level[row])
        elif adjusted[row, -1] >= threshold:
            kind, fit = "ADD", float(adjusted[row, -1])
        types.append(kind)
        fits.append(fit)
    return types, fits, member.tolist()


def _alone(f: Tensor, live: Tensor, flat: float) -> Gate:
    """The gate of a group of which no two members change in the same pair."""
    at_work = live.any(1).nonzero()[:, 0].tolist()
    kind: GateType = "SOLE" if len(at_work) == 1 else "MIXED"
    spread = ((f.amax(0) - f.amin(0)) ** 2).mean().sqrt() if f.shape[1] else f.new_zeros(())
    if float(spread) <= flat:
        kind = "INERT"
    known = float(kind != "MIXED")
    member = at_work[0] if kind == "SOLE" else None
    return Gate(kind, known, known, _redundancy(f, flat), 0.0, member, 0)


def _redundancy(f: Tensor, flat: float) -> float | None:
    total = float((f[-1] - f[0]).mean()) if f.shape[1] else 0.0
    if abs(total) <= flat:
        return None
    return 1 - float(noising(f).mean(1).sum()) / total


def _mean_interaction(f: Tensor, live: Tensor) -> float:
    values = []
    for i, j in combinations(range(len(live)), 2):
        both = live[i] & live[j]
        values.append(interaction(f, i, j)[both])
    return float(torch.cat(values).mean())


def _split(table: Tensor, i: int) -> Tensor:
    """A view ``[2**(k-1-i), 2, 2**i, n_pairs]`` of the table, bit ``i`` in the second place."""
    return table.view(-1, 2, 1 << i, table.shape[1])


def _members(f: Tensor) -> int:
    return len(f).bit_length() - 1


def _checked(f: Tensor) -> tuple[Tensor, int]:
    """The table in float64 on the CPU, where it is small work, and its number of members."""
    rows = len(f) if f.ndim == 2 else 0
    k = rows.bit_length() - 1
    if f.ndim != 2 or rows != 1 << max(k, 0) or not 1 <= k <= MAX_MEMBERS:
        raise OptionError(
            f"mixture table has shape {list(f.shape)}; it must be [2**k, n_pairs] for a group of "
            f"k members, 1 to {MAX_MEMBERS}"
        )
    f = f.to("cpu", torch.float64).contiguous()
    if not torch.isfinite(f).all():
        row, pair = (~torch.isfinite(f)).nonzero()[0].tolist()
        raise NumericsError(
            f"mixture table has a NaN or infinity at row {row}, pair {pair + 1}; run the "
            f"model in float32"
        )
    return f, k
