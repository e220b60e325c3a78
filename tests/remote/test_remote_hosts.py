"""Which hosts and models there can be: safe addresses, keys, names, and what stays here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback_host import Loopback

from circuitlab import ModelError, OptionError, RemoteError, TracedModel, load_model
from circuitlab.progress import listening

Loader = Callable[..., TracedModel]


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "not-äscii"])
def test_impossible_key(on_host: Loader, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """A key that no header can carry is refused before anything is sent, without showing it."""
    monkeypatch.setenv("NDIF_API_KEY", key)
    with pytest.raises(OptionError, match="characters that no key has") as raised:
        on_host("test/ids")
    assert key not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    ["http://example.org", "http://10.0.0.1:80", "ftp://a", "ndif", "https://[", "https://"],
)
def test_unsafe_hosts(on_host: Loader, address: str) -> None:
    """Only https and this machine: a usage error, before anything is sent."""
    with pytest.raises(OptionError, match=r"remote host '.*' is no"):
        on_host("test/ids", remote=address)


def test_password_in_the_address(on_host: Loader) -> None:
    """It is refused and not shown."""
    with pytest.raises(OptionError, match="with a password") as raised:
        on_host("test/ids", remote="https://me:secret@example.org")
    assert "secret" not in str(raised.value)


def test_other_hosts_are_warned_of(on_host: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to a host that is neither NDIF nor here is told at once."""
    monkeypatch.setattr("circuitlab.remote.client.TRIES", 1)
    monkeypatch.setattr("circuitlab.remote.client.CONNECT", 0.01)
    warnings: list[str] = []
    with (
        listening(lambda *_: None, warnings.append),
        pytest.raises(RemoteError, match="cannot be reached"),
    ):
        on_host("test/ids", remote="https://192.0.2.1")
    assert warnings == [
        "prompts, activations and the API key go to https://192.0.2.1, which is not NDIF"
    ]


def test_timeout_must_leave_time(on_host: Loader) -> None:
    """No time at all is a usage error."""
    with pytest.raises(OptionError, match="leaves no time"):
        on_host("test/ids", timeout=0)


def test_models_that_are_here(host: Loopback, near_ids: TracedModel) -> None:
    """What is on no host is not quietly run here."""
    module: Any = near_ids._module
    for source in ("hand-and", module, (module, None)):
        with pytest.raises(ModelError, match="on no host"):
            load_model(source, remote=host.url)


@pytest.mark.parametrize(("revision", "code"), [(None, False), ("v1", False), (None, True)])
def test_model_keys_are_nnsights(
    monkeypatch: pytest.MonkeyPatch, revision: str | None, code: bool
) -> None:
    """What a model is called is what nnsight would call it; the hub's spelling where it answers."""
    import huggingface_hub
    from loopback_host import model_key
    from nnsight.modeling import huggingface

    from circuitlab.remote.client import remote_client

    class Hub:
        def model_info(self, name: str, timeout: float = 0.0) -> Any:
            return type("Info", (), {"id": f"org/{name}"})

    def ours(name: str, asked: str | None, *, ask_hub: bool, folder: bool = False) -> str:
        client = remote_client("https://api.ndif.us", asked, 1.0, None)
        client.name_model(name, folder, revision, code, ask_hub=ask_hub)
        return client.model_key

    def nnsights(name: str) -> str:
        class Named(huggingface.HuggingFaceModel):  # type: ignore[misc]  # untyped upstream
            def __init__(self) -> None:
                self.repo_id, self.revision = name, revision
                self.kwargs = {"trust_remote_code": code}

        monkeypatch.setitem(huggingface._ID_CACHE, name, name)
        parts = json.loads(Named()._remoteable_model_key()) | {"task": "text-generation"}
        return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(parts)}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert ours("gpt2", None, ask_hub=True) == nnsights("org/gpt2")
    assert ours("gpt2", None, ask_hub=False) == nnsights("gpt2")
    assert ours("gpt2", "me/other", ask_hub=True) == nnsights("me/other")
    assert ours("folder", "me/other", ask_hub=False, folder=True) == nnsights("me/other")
    whole = "nnsight.modeling.language.LanguageModel:me/other"
    assert ours("gpt2", whole, ask_hub=True) == whole
    if revision is None and not code:
        assert nnsights("gpt2") == model_key("gpt2")


def test_another_model_of_that_name(on_host: Loader) -> None:
    """A host whose model is not the one configured here is found out."""
    with pytest.raises(RemoteError, match="it is another model; check --remote-key"):
        on_host("test/ids", remote_key="test/text")


def test_folder_without_a_name(host: Loopback, folders: dict[str, Path]) -> None:
    """A folder is nothing that a host knows: its name there must be said."""
    with pytest.raises(OptionError, match="--remote-key"):
        load_model(folders["test/ids"], remote=host.url)


def test_device_and_type_are_the_hosts(on_host: Loader) -> None:
    """Asking for a device or a type is refused."""
    for options in ({"device": "cpu"}, {"dtype": "float64"}):
        with pytest.raises(OptionError, match="its host gave it"):
            on_host("test/ids", **options)


def test_fresh_weights_are_refused(far_ids: TracedModel) -> None:
    """A host runs the weights it has."""
    with pytest.raises(ModelError, match="on a host"):
        far_ids.reinitialised()
