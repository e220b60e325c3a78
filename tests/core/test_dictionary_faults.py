"""Damaged and hostile dictionary files are refused in one line; writing is whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dictionary_oracles as oracles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saelens_files import MIDDLE, PRESENT, D, N, save_folder, tensors_of
from safetensors.torch import save_file

from circuitlab import (
    Dictionary,
    DictionaryInfo,
    ModelError,
    ResourceError,
    read_dictionary,
    write_dictionary,
)

WEIGHTS = "sae_weights.safetensors"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refused(folder: Path) -> str:
    """The message with which a folder is refused: one line that begins with its name."""
    with pytest.raises(ModelError) as caught:
        read_dictionary(folder)
    message = str(caught.value)
    assert message.startswith(f"dictionary '{folder}': ")
    assert message.isprintable()
    return message


# --- cfg.json -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "batchtopk"}, "architecture 'batchtopk' is unknown; there are standard,"),
        ({"architecture": ["topk"]}, "is unknown"),
        ({"architecture": "topk"}, "k is None; it must be 1 to 9"),
        ({"architecture": "topk", "k": 10}, "k is 10; it must be 1 to 9"),
        ({"architecture": "topk", "k": True}, "k is True"),
        ({"architecture": "topk", "k": 2.0}, "k is 2.0"),
        ({"k": 3}, "unknown keys k"),
        ({"input_unit_norm": True}, "unknown keys input_unit_norm; if they do not change what it"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu' with {} is not supported"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 2, "signed": True}}, "signed"),
        ({"d_in": 0}, "d_in is 0; it must be an integer of 1 to "),
        ({"d_in": None}, "d_in is None"),
        ({"d_in": 10**4000}, "d_in is 1000"),
        ({"d_sae": None, "expansion_factor": 10**4000}, "d_sae is "),
        ({"d_sae": "9"}, "d_sae is '9'"),
        ({"d_sae": 8}, "tensor W_enc has shape [5, 9], and cfg.json says [5, 8]"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1; it must be of type bool"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"dtype": {"value": "torch.float32"}}, "dtype is"),
        ({"reshape_activations": "flatten"}, "reshape_activations 'flatten' is not supported"),
        ({"rescale_acts_by_decoder_norm": True}, "and it is no topk dictionary"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": True}, "a transcoder cannot do"),
        (
            {"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": 7}
            | {"normalize_activations": "expected_average_only_in"},
            "is not supported for a transcoder",
        ),
        ({"metadata": []}, "metadata is []; it must be of type dict"),
        ({"metadata": {"hook_name": "blocks.1.ln2.hook_normalized"}}, "unknown; write a site such"),
        ({"metadata": {"hook_name": "hook_resid_pre"}}, "unknown; write a site such"),
        ({"metadata": {"hook_name": 3}}, "hook_name is 3; it must be of type str"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_pre", "hook_layer": 2}}, "layer 2 stands"),
        ({"metadata": {"context_size": -1}}, "context_size is -1; it must be positive"),
        ({"metadata": {"hook_name_out": "blocks.1.hook_mlp_out"}}, "give transcoder=True"),
        ({"model_name": "other"}, "model_name stands at the top and under metadata, and differs"),
        ({"hook_name": "a", "hook_point": "b"}, "hook_point and hook_name say the same thing"),
        (
            {"metadata": {"circuitlab": {"schema": "2"}}},
            "has schema '2', not circuitlab-dictionary",
        ),
        (
            {"metadata": {"circuitlab": {"schema": "circuitlab-dictionary/1", "new": 1}}},
            "metadata.circuitlab has unknown keys new",
        ),
        (
            {"metadata": {"circuitlab": {"schema": "circuitlab-dictionary/1", "padding": "x"}}},
            "padding 'x' is none of",
        ),
        (
            {"metadata": {"circuitlab": {"schema": "circuitlab-dictionary/1", "bandwidth": 0.0}}},
            "bandwidth is 0.0",
        ),
    ],
    ids=str,
)
def test_each_wrong_key_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """The message has the folder, the key, what it says and what it should."""
    folder = save_folder(tmp_path / "sae", PRESENT | change, tensors_of("standard"))
    assert says in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "\ufeff{}", '{"d_in": NaN}', "[" * 100_000])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    """Other text, NaN, and nesting without end."""
    folder = save_folder(tmp_path / "sae", PRESENT, tensors_of("standard"))
    (folder / "cfg.json").write_text(text, encoding="utf-8")
    assert "JSON" in refused(folder)
    (folder / "cfg.json").write_bytes(b"\xff\xfe")
    assert "cfg.json is not JSON" in refused(folder)


@MANY
@given(
    generation=st.sampled_from([MIDDLE, PRESENT]),
    pick=st.integers(0, 99),
    value=JSON,
    remove=st.booleans(),
)
def test_any_other_value_is_read_or_refused(
    tmp_path: Path, generation: dict[str, Any], pick: int, value: Any, remove: bool
) -> None:
    """A key taken out or given any JSON value: a dictionary comes back, or a ModelError."""
    config = json.loads(json.dumps(generation))
    places = [(config, name) for name in config]
    places += [(config["metadata"], name) for name in config.get("metadata", {})]
    place, name = places[pick % len(places)]
    if remove:
        del place[name]
    else:
        place[name] = value
    folder = save_folder(tmp_path / "sae", config, tensors_of("standard"))
    try:
        found = read_dictionary(folder)
    except ModelError:
        refused(folder)
    else:
        assert isinstance(found, Dictionary)
        assert (found.d_in, found.n) == (D, N)


# --- weights --------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("b_enc"), "lacks tensors b_enc"),
        (lambda t: t.update(b_gate=torch.ones(N)), "has unknown tensors b_gate"),
        (lambda t: t.update(W_dec=torch.ones(D, N)), "W_dec has shape [5, 9], and cfg.json says"),
        (lambda t: t.update(b_dec=torch.ones(D).long()), "tensor b_dec is of type I64"),
        (lambda t: t.update(b_dec=torch.full((D,), torch.nan)), "tensor b_dec holds NaN or inf"),
        (lambda t: t.update(W_enc=t["W_enc"] / 0), "tensor W_enc holds NaN or infinity"),
    ],
)
def test_each_wrong_tensor_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    """Missing, unknown, of another shape or type, or not finite."""
    tensors = tensors_of("standard")
    change(tensors)
    assert says in refused(save_folder(tmp_path / "sae", MIDDLE, tensors))


def test_values_too_large_for_float32_are_refused(tmp_path: Path) -> None:
    """Folding a scale may overflow; the result is checked too."""
    tensors = tensors_of("topk") | {"W_enc": torch.full((D, N), 3e38)}
    config = PRESENT | {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True}
    assert "holds NaN or infinity" in refused(save_folder(tmp_path / "sae", config, tensors))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary that we wrote."""
    folder = tmp_path_factory.mktemp("written") / "sae"
    write_dictionary(oracles.random_dictionary(dtype=torch.float32), folder)
    return folder


@MANY
@given(
    cut=st.integers(0, 1500),
    flips=st.lists(st.tuples(st.integers(0, 1499), st.integers(1, 255)), max_size=5),
)
def test_damaged_weights_are_refused(
    written: Path, tmp_path: Path, cut: int, flips: list[tuple[int, int]]
) -> None:
    """Whatever byte is changed or missing: our files have a digest of their weights."""
    whole = (written / WEIGHTS).read_bytes()
    damaged = bytearray(whole[:cut])
    for at, change in flips:
        if at < cut < len(whole):
            damaged[at] ^= change
    (tmp_path / "cfg.json").write_bytes((written / "cfg.json").read_bytes())
    (tmp_path / WEIGHTS).write_bytes(damaged)
    if damaged == whole:
        read_dictionary(tmp_path)
    else:
        assert "is not the one that was written with cfg.json" in refused(tmp_path)


@MANY
@given(flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=4))
def test_damaged_headers_of_others_are_refused(
    tmp_path: Path, flips: list[tuple[int, int]]
) -> None:
    """Without a digest a changed name, shape or offset is a ModelError; never anything else."""
    folder = save_folder(tmp_path / "sae", MIDDLE, tensors_of("standard"))
    damaged = bytearray((folder / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(damaged[:8], "little")
    for at, change in flips:
        damaged[at % header] ^= change
    (folder / WEIGHTS).write_bytes(damaged)
    try:
        found = read_dictionary(folder)
    except ModelError:
        return
    assert (found.d_in, found.n) == (D, N)


def test_a_short_file_is_damaged(tmp_path: Path) -> None:
    """What is cut off is missed."""
    folder = save_folder(tmp_path / "sae", MIDDLE, tensors_of("standard"))
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        assert "sae_weights.safetensors is damaged" in refused(folder)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    """A folder with weights that would run code says so; nothing is run."""
    folder = save_folder(tmp_path / "sae", MIDDLE, tensors_of("standard"))
    os.rename(folder / "sae_weights.safetensors", folder / "ae.pt")
    assert "missing (ae.pt would run code when read); save it with safetensors" in refused(folder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """No folder, no cfg.json, no weights."""
    assert "there is no such folder; give one with cfg.json" in refused(tmp_path / "no")
    folder = tmp_path / "sae"
    folder.mkdir()
    assert "cfg.json is missing" in refused(folder)
    save_folder(folder, MIDDLE, tensors_of("standard"))
    (folder / "sae_weights.safetensors").unlink()
    assert "sae_weights.safetensors is missing; save it" in refused(folder)
    (folder / "cfg.json").unlink()
    (folder / "cfg.json").mkdir()
    with pytest.raises(ResourceError, match="cannot be read: Is a directory"):
        read_dictionary(folder)


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "number", "replaced"),
    [
        ("fsync", 1, False),
        ("fsync", 2, True),
        ("rename", 1, False),
        ("rename", 1, True),
        ("rename", 2, True),
    ],
)
def test_a_failed_write_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, replaced: bool
) -> None:
    """The folder is the old one, or not there, and nothing else lies about.

    Of the renames that replace a folder the first moves it away and the second fills its place;
    when that fails, a third brings the old one back.
    """
    old, new = oracles.random_dictionary(seed=1), oracles.random_dictionary(seed=2)
    if replaced:
        write_dictionary(old, tmp_path / "sae")
    real, calls = getattr(os, call), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(f"circuitlab.dictionaries.files.os.{call}", failing)
        with pytest.raises(ResourceError, match="No space left on device; check free space"):
            write_dictionary(new, tmp_path / "sae")
    assert os.listdir(tmp_path) == (["sae"] if replaced else [])
    if replaced:
        assert torch.equal(read_dictionary(tmp_path / "sae").W_e, old.W_e)
    write_dictionary(new, tmp_path / "sae")
    assert torch.equal(read_dictionary(tmp_path / "sae").W_e, new.W_e)


def test_names_that_break_lines_do_not_break_messages(tmp_path: Path) -> None:
    """Text of strangers is shown safe and short."""
    config = PRESENT | {"evil\n\x1b[31m": 1}
    folder = save_folder(tmp_path / "sae", config, tensors_of("standard"))
    assert r"evil\u{a}\u{1b}[31m" in refused(folder)
    bad = PRESENT | {"metadata": {"hook_name": "x" * 5000}}
    assert len(refused(save_folder(folder, bad, tensors_of("standard")))) < 1000
    tensors = tensors_of("standard") | {"a\nb": torch.ones(1)}
    save_folder(folder, PRESENT, tensors_of("standard"))
    save_file(tensors, folder / "sae_weights.safetensors")
    assert r"unknown tensors a\u{a}b" in refused(folder)


def test_a_file_says_where_it_belongs(tmp_path: Path) -> None:
    """Both sites of a transcoder come back from hooks."""
    info = DictionaryInfo(site="z.0.h1", target="mlp_out.3")
    d = oracles.random_dictionary(form="transcoder", info=info)
    write_dictionary(d, tmp_path / "tc")
    metadata = json.loads((tmp_path / "tc" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.0.attn.hook_z"
    assert metadata["hook_head_index"] == 1
    assert metadata["hook_name_out"] == "blocks.3.hook_mlp_out"
    assert read_dictionary(tmp_path / "tc").info == info
