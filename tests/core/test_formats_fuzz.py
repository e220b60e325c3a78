"""Damaged and hostile files: every one is a circuit or one clear error, never a crash."""

from __future__ import annotations

import json
from typing import Any

import pytest
from format_samples import TEXTS, planted
from hypothesis import example, given, settings
from hypothesis import strategies as st

from circuitlab.errors import GraphError
from circuitlab.export import EXPORTERS, READERS
from circuitlab.graph import CircuitGraph


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for suffix in READERS:
        EXPORTERS[suffix](planted(), folder / f"a{suffix}")
        found[suffix] = (folder / f"a{suffix}").read_bytes()
    return found


def read(suffix: str, data: bytes) -> CircuitGraph | None:
    """The circuit, checked; None where it is refused as it should be."""
    try:
        circuit = READERS[suffix](data)
    except (GraphError, RecursionError, UnicodeDecodeError):  # one error of read_circuit
        return None
    circuit.validate()
    return circuit


@pytest.mark.parametrize("suffix", sorted(READERS))
@settings(max_examples=150, deadline=None)
@given(
    place=st.floats(0, 1), length=st.integers(0, 30),
    patch=st.one_of(st.binary(max_size=12), TEXTS.map(lambda t: t.encode("utf-8", "replace")),
                    st.sampled_from([b"NaN", b"1e999", b"null", b"[]", b"{}", b"-1",
                                     b"<!DOCTYPE x>",
                                     b'"', b"</node>", b"&lol;", b"true"])),
)  # fmt: skip
def test_damaged_bytes(
    written: dict[str, bytes], suffix: str, place: float, length: int, patch: bytes
) -> None:
    """Any part of a file replaced by anything."""
    data = written[suffix]
    start = round(place * len(data))
    read(suffix, data[:start] + patch + data[start + length :])


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.integers(10**30, 10**40), TEXTS, st.lists(TEXTS, max_size=2), st.just({}),
    st.dictionaries(TEXTS, TEXTS, max_size=2),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


@pytest.mark.parametrize("suffix", sorted(s for s in READERS if s.endswith("json")))
@settings(max_examples=150, deadline=None)
@given(data=st.data(), value=VALUES)
@example(data=None, value={})
def test_any_value_anywhere(written: dict[str, bytes], suffix: str, data: Any, value: Any) -> None:
    """One value of a document replaced by another of any type."""
    document = json.loads(written[suffix])
    listed = places(document)
    path = listed[0] if data is None else data.draw(st.sampled_from(listed))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    read(suffix, json.dumps(document).encode())


def test_undamaged_files_are_read(written: dict[str, bytes]) -> None:
    """The files that are damaged above are circuits."""
    assert all(read(suffix, data) is not None for suffix, data in written.items())
