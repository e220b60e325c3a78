"""A loopback NDIF for the tests of this folder, and models here and there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import random_module
from loopback_host import SHORT, Loopback, serving

from circuitlab import TracedModel, load_model

#: Families that are served, beside the text model.
SERVED = ("llama", "neox", "gemma2", "olmo2")


@pytest.fixture(scope="session")
def folders(
    tmp_path_factory: pytest.TempPathFactory, ids_model: Path, text_model: Path
) -> dict[str, Path]:
    """Models on the disk, by what the host calls them."""
    found = {"test/ids": ids_model, "test/text": text_model}
    for family in SERVED:
        found[f"test/{family}"] = tmp_path_factory.mktemp(family)
        module: Any = random_module(family)
        module.save_pretrained(found[f"test/{family}"])
    return found


@pytest.fixture(scope="session")
def server(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loopback]:
    """The server, once for all tests."""
    with serving(folders, tmp_path_factory.mktemp("host")) as running:
        yield running


@pytest.fixture
def host(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """The server, behaving as usual; waiting for it is short."""
    for name, value in SHORT.items():
        monkeypatch.setattr(f"circuitlab.remote.client.{name}", value)
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    server.tell()
    yield server
    server.tell()


Loader = Callable[..., TracedModel]


@pytest.fixture
def on_host(host: Loopback, folders: dict[str, Path]) -> Loader:
    """``on_host("test/ids")``: a model whose weights the server has."""

    def load(name: str, **options: Any) -> TracedModel:
        options = {"remote": host.url, "remote_key": name, **options}
        return load_model(folders[name], **options)

    return load


@pytest.fixture(scope="session")
def far_ids(server: Loopback, folders: dict[str, Path]) -> TracedModel:
    """The ids model on the server, loaded once."""
    return load_model(folders["test/ids"], remote=server.url, remote_key="test/ids")


@pytest.fixture(scope="session")
def near_ids(folders: dict[str, Path]) -> TracedModel:
    """The same model on this machine."""
    return load_model(folders["test/ids"])
