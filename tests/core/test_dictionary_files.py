"""Dictionary files: SAELens's layouts, old and new, are read, and ours is one of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import dictionary_oracles as oracles
import pytest
import torch
from saelens_files import (
    FIELDS,
    FIRST,
    MIDDLE,
    MORE,
    PRESENT,
    D,
    N,
    as_documented,
    save_folder,
    tensors_of,
)
from safetensors.torch import load_file
from torch import Tensor

from circuitlab import (
    DictionaryInfo,
    ModelError,
    OptionError,
    ResourceError,
    read_dictionary,
    write_dictionary,
)

EACH = [(kind, form) for kind in oracles.KINDS for form in oracles.FORMS]


def check_against_the_documentation(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """What is read computes what SAELens documents."""
    d, x = read_dictionary(folder), oracles.inputs(D)
    wanted = as_documented(config, tensors, x)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(d(x).detach().double(), wanted, rtol=1e-4, atol=1e-4)


# --- files of SAELens -----------------------------------------------------------------------------


def test_the_first_layout(tmp_path: Path) -> None:
    """Facts and options stand at the top under early names; b_dec is applied to the input."""
    tensors = tensors_of("standard")
    folder = save_folder(tmp_path / "sae", FIRST, tensors)
    check_against_the_documentation(folder, FIRST, tensors)
    d = read_dictionary(folder)
    assert d.apply_b_dec_to_input
    info = d.info
    assert (info.site, info.model, info.context_length) == ("resid_pre.0", "gpt2-small", 128)
    assert (info.data, info.bos, info.target) == ("Skylion007/openwebtext", None, None)
    assert info.training["l1_coefficient"] == 8e-05
    assert "center_writing_weights" in info.differences(DictionaryInfo())[0]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"apply_b_dec_to_input": True},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
        {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}},
        {"architecture": "gated"},
        {"architecture": "jumprelu"},
        {"normalize_activations": None},
        {"normalize_activations": False},
        {"finetuning_scaling_factor": True},
    ],
    ids=str,
)
def test_the_middle_layout(tmp_path: Path, change: dict[str, Any]) -> None:
    """Facts at the top, activation_fn_str, topk as an activation of a standard dictionary."""
    config = MIDDLE | change
    tensors = tensors_of(config["architecture"])
    if config["finetuning_scaling_factor"]:
        tensors["finetuning_scaling_factor"] = torch.linspace(0.5, 2, N)
    folder = save_folder(tmp_path / "sae", config, tensors)
    check_against_the_documentation(folder, config, tensors)
    info = read_dictionary(folder).info
    assert (info.site, info.bos, info.context_length) == ("mlp_out.3", True, 1024)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"apply_b_dec_to_input": False},
        {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": False},
        {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True},
        {"architecture": "gated"},
        {"architecture": "jumprelu"},
        *(
            {"architecture": name, "d_out": D + 2, "apply_b_dec_to_input": False}
            for name in MORE
            if name != "topk"
        ),
    ],
    ids=str,
)
def test_the_present_layout(tmp_path: Path, change: dict[str, Any]) -> None:
    """Facts under metadata; scales by decoder norm, thresholds below 0, skips."""
    config = PRESENT | change
    tensors = tensors_of(config["architecture"])
    folder = save_folder(tmp_path / "sae", config, tensors)
    check_against_the_documentation(folder, config, tensors)
    info = read_dictionary(folder).info
    assert (info.site, info.model, info.bos) == ("resid_post.11", "gpt2", False)
    assert info.training == {
        "sae_lens_training_version": "6.12.1",
        "seqpos_slice": [None],
        "l0": 31.5,
    }


def test_scales_of_activations_are_folded_where_they_are_stored(tmp_path: Path) -> None:
    """A constant is folded into the weights; without it, or with another kind, it is refused."""
    tensors = tensors_of("standard")
    config = PRESENT | {"normalize_activations": "expected_average_only_in"}
    folder = save_folder(tmp_path / "sae", config, tensors)
    stored = folder / "activation_scaler.json"
    for text in (None, "{}", '{"scaling_factor": null}', '{"scaling_factor": -1.0}', "[]"):
        if text is not None:
            stored.write_text(text)
        with pytest.raises(ModelError, match="the scale is not stored; fold it into the weights"):
            read_dictionary(folder)
    stored.write_text('{"scaling_factor": 0.25, "has_whitening": false}')
    check_against_the_documentation(folder, config | {"scale": 0.25}, tensors)
    for how in ("layer_norm", "constant_norm_rescale", 3):
        save_folder(folder, PRESENT | {"normalize_activations": how}, tensors)
        with pytest.raises(ModelError, match="only a constant scale can be folded"):
            read_dictionary(folder)


def test_scales_of_latents(tmp_path: Path) -> None:
    """A scale of 1 is left out; another one that cfg.json does not know of is refused."""
    tensors = tensors_of("standard")
    folder = save_folder(tmp_path / "sae", MIDDLE, tensors | {"scaling_factor": torch.ones(N)})
    check_against_the_documentation(folder, MIDDLE, tensors)
    save_folder(folder, MIDDLE, tensors | {"scaling_factor": torch.full((N,), 2.0)})
    with pytest.raises(ModelError, match="scaling_factor is not 1, and finetuning"):
        read_dictionary(folder)
    save_folder(folder, MIDDLE | {"finetuning_scaling_factor": True}, tensors)
    with pytest.raises(ModelError, match="has not one of it"):
        read_dictionary(folder)


def test_thresholds_of_early_checkpoints_are_logarithms(tmp_path: Path) -> None:
    """``log_threshold`` stands for the threshold's logarithm."""
    tensors = tensors_of("jumprelu")
    kept = tensors | {"threshold": tensors["threshold"].exp()}
    tensors["log_threshold"] = tensors.pop("threshold")
    config = MIDDLE | {"architecture": "jumprelu"}
    folder = save_folder(tmp_path / "sae", config, tensors)
    check_against_the_documentation(folder, config, kept)


def test_heads_side_by_side(tmp_path: Path) -> None:
    """hook_z with all heads is the site z; one head stands beside the hook; others do not fit."""
    hooked = MIDDLE | {"hook_name": "blocks.3.attn.hook_z"}
    folder = save_folder(tmp_path / "sae", hooked, tensors_of("standard"))
    assert read_dictionary(folder).info.site == "z.3"
    save_folder(folder, hooked | {"hook_head_index": 2}, tensors_of("standard"))
    assert read_dictionary(folder).info.site == "z.3.h2"
    save_folder(folder, MIDDLE | {"reshape_activations": "hook_z"}, tensors_of("standard"))
    with pytest.raises(ModelError, match=r"is hook_z, and the site is mlp_out.3"):
        read_dictionary(folder)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_types(tmp_path: Path, kind: torch.dtype) -> None:
    """Half-precision files are read as float32, float64 stays."""
    tensors = {name: tensor.to(kind) for name, tensor in tensors_of("standard").items()}
    config = MIDDLE | {"dtype": str(kind)}
    folder = save_folder(tmp_path / "sae", config, tensors)
    check_against_the_documentation(folder, config, tensors)
    wanted = torch.float64 if kind == torch.float64 else torch.float32
    assert {p.dtype for p in read_dictionary(folder, device="cpu").parameters()} == {wanted}


# --- files of our own -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "form"), EACH)
def test_round_trip(tmp_path: Path, kind: str, form: str, dtype: torch.dtype) -> None:
    """What was written is read, bit for bit, and computes what SAELens documents for the file."""
    info = DictionaryInfo(
        site="z.2" if form == "plain" else "mlp_in.2",
        target="mlp_out.2" if form in ("transcoder", "skip") else None,
        model="gpt2",
        revision="abc",
        context_length=64,
        data="text",
        data_digest="0f",
        padding="excluded",
        bos=True,
        training={"steps": 100, "note": "a", "nested": {"list": [1, None, 0.5]}},
    )
    d = oracles.random_dictionary(kind, form, dtype=dtype, bandwidth=0.02, info=info)
    write_dictionary(d, tmp_path / "sae")
    again = read_dictionary(tmp_path / "sae")
    assert repr(again) == repr(d)
    assert again.info == d.info
    assert again.bandwidth == d.bandwidth
    assert again.apply_b_dec_to_input == d.apply_b_dec_to_input
    for name, parameter in d.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    assert sorted(os.listdir(tmp_path)) == ["sae"]
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    x = oracles.inputs(D)
    wanted = as_documented(config, tensors, x).to(dtype)
    torch.testing.assert_close(d(x).detach(), wanted, rtol=1e-4, atol=1e-4)
    if config["architecture"] in ("standard", "gated", "jumprelu", *MORE):
        assert config.keys() == FIELDS | MORE.get(config["architecture"], set())
    assert config["metadata"]["sae_lens_version"].split(".") >= ["6", "0", "0"]
    assert config["reshape_activations"] == ("hook_z" if form == "plain" else "none")


def test_little_may_be_known(tmp_path: Path) -> None:
    """A dictionary without any facts, and one of a single head, come back as they were."""
    d = oracles.random_dictionary(bandwidth=1)
    write_dictionary(d, tmp_path / "sae")
    assert read_dictionary(tmp_path / "sae").info == DictionaryInfo()
    assert read_dictionary(tmp_path / "sae").bandwidth == 1.0
    d.info = DictionaryInfo(site="z.1.h0")
    write_dictionary(d, tmp_path / "sae")
    assert read_dictionary(tmp_path / "sae").info == d.info
    transcoder = oracles.random_dictionary(form="transcoder")
    write_dictionary(transcoder, tmp_path / "tc")
    assert read_dictionary(tmp_path / "tc").transcoder


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Facts that are no JSON, names that are taken, and folders that hold something else."""
    d = oracles.random_dictionary()
    for training, says in (
        ({"x": torch.nan}, "no plain, finite JSON"),
        ({"x": object()}, "no plain, finite JSON"),
        ({"hook_name": "a"}, "hook_name have names that are taken"),
    ):
        d.info = DictionaryInfo(training=training)
        with pytest.raises(OptionError, match=says):
            write_dictionary(d, tmp_path / "sae")
    d.info = DictionaryInfo()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep me")
    with pytest.raises(ResourceError, match=r"holds other files \(a.txt\); name another folder"):
        write_dictionary(d, tmp_path / "notes")
    with pytest.raises(ResourceError, match="is a file; name a folder"):
        write_dictionary(d, tmp_path / "notes" / "a.txt")
    with pytest.raises(ResourceError, match="cannot be written: No such file or directory"):
        write_dictionary(d, tmp_path / "nowhere" / "sae")
    assert (tmp_path / "notes" / "a.txt").read_text() == "keep me"
    assert os.listdir(tmp_path) == ["notes"]
