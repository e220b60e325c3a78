"""``--fail-under``: numbers that a result must reach, read before it and held to it after."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

from circuitlab.errors import OptionError, QualityError

Threshold = tuple[str, float]


def read(texts: Iterable[str], known: Collection[str]) -> list[Threshold]:
    """Texts such as ``accuracy=0.9`` as names and numbers.

    Raises:
        OptionError: one is not of that form, or names no number of the result.
    """
    return [_read(text, known) for text in texts]


def _read(text: str, known: Collection[str]) -> Threshold:
    name, _, number = text.partition("=")
    name = name.strip().replace("-", "_")
    try:
        least = float(number)
    except ValueError:
        least = math.nan
    if not math.isfinite(least):
        raise OptionError(f"--fail-under {text!r} is not NAME=NUMBER, as accuracy=0.9")
    if name not in known:
        raise OptionError(
            f"--fail-under {text!r}: a result has no metric {name!r}; "
            f"its metrics are {', '.join(known)}"
        )
    return name, least


def hold(thresholds: Iterable[Threshold], found: Callable[[str], float | None]) -> None:
    """Refuse a result that is below one.

    Raises:
        QualityError: names the first that it does not reach; one that is undefined does not.
    """
    for name, least in thresholds:
        value = found(name)
        if value is None or value < least:
            raise QualityError(
                f"{name} is {'undefined' if value is None else f'{value:.4g}'}, below the "
                f"{least:g} that --fail-under asks for"
            )
