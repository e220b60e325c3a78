"""The table of families.md is true: every cell here, and a part of them on a loopback host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from family_table import COLUMNS, WORK, Place, assert_same, read, rows, save
from loopback_host import SHORT, Loopback, serving

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
#: Every analysis runs on these through the host (and on GPT-2, see ``remote``); on the others two.
WHOLE = ("neox", "gemma2")
SOME = ("edge-attribution", "token-ablation")
THERE = [(family, work) for family in COLUMNS for work in (WORK if family in WHOLE else SOME)]

Places = Callable[[str], Place]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all columns."""
    made = tmp_path_factory.mktemp("families")
    save(made)
    return made


@pytest.fixture(scope="module")
def here(folder: Path) -> Places:
    """A family's model on this machine; loaded, and each analysis run, once."""
    return cache(lambda family: Place.load(folder / family, folder / "here" / family))


@pytest.fixture(scope="module")
def host(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A host that has all of them."""
    models = {f"test/{family}": folder / family for family in COLUMNS}
    with serving(models, tmp_path_factory.mktemp("host")) as running:
        yield running


@pytest.fixture(scope="module")
def there(folder: Path, host: Loopback) -> Iterator[Places]:
    """A family's model on the host."""

    def load(family: str) -> Place:
        return Place.load(
            folder / family, folder / "there" / family, host.url, key=f"test/{family}"
        )

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(f"circuitlab.remote.client.{name}", value)
        patch.delenv("NDIF_API_KEY", raising=False)
        yield cache(load)


@pytest.mark.parametrize("family", COLUMNS)
def test_every_cell_is_what_happens(here: Places, family: str) -> None:
    """The column of a family says what its model does and what it refuses, and why."""
    page = read(PAGE.read_text("utf-8"))
    told = {work: page[family, work] for work in WORK}
    assert told == {work: here(family).do(work).cell for work in WORK}


@pytest.mark.parametrize(("family", "work"), THERE)
def test_it_is_the_same_there(here: Places, there: Places, family: str, work: str) -> None:
    """Through the host: the same numbers to 1e-5 of the largest, or the same refusal."""
    assert_same(there(family).do(work), here(family).do(work))


def test_table_is_read_as_it_is_written() -> None:
    """Reading the lines of a table gives the cells that it was made of, reasons and all."""
    answers = ("yes", "no: it has none; or few", "yes: with `--top 3` alone: too many")
    places = [(family, work) for family in COLUMNS for work in WORK]
    cells = {place: answers[number % 3] for number, place in enumerate(places)}
    assert read("\n".join(rows(cells))) == cells


def test_a_difference_is_found() -> None:
    """A number that is off by more than 1e-5 of the largest, a word, a place or a refusal."""
    from family_table import Outcome

    here = Outcome({"a": 4.0, "b": 0.5, "c": "x"})
    assert_same(Outcome({"a": 4.0, "b": 0.5 + 3e-5, "c": "x"}), here)
    for found in (
        {"a": 4.0, "b": 0.5 + 5e-5, "c": "x"},
        {"a": 4.0, "b": 0.5, "c": "y"},
        {"a": 4.0, "b": 0.5},
        None,
    ):
        with pytest.raises(AssertionError):
            assert_same(Outcome(found, None if found else ("ModelError", "no")), here)
