"""How a dictionary is written in the layout of SAELens."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from circuitlab.dictionaries.dictionary import Dictionary
from circuitlab.dictionaries.info import flattened, hook_name
from circuitlab.dictionaries.layout import ARCHITECTURES, FACTS, OWN, RENAMED, SCHEMA, VERSION
from circuitlab.errors import OptionError


def write_config(dictionary: Dictionary) -> dict[str, Any]:
    """The ``cfg.json`` of a dictionary; the digest of its weights is still to come.

    Raises:
        OptionError: facts of the training are no plain JSON, or have names that are taken.
    """
    d, info = dictionary, dictionary.info
    layout = (d.nonlinearity, d.transcoder, d.W_skip is not None)
    facts = {
        "model_name": info.model,
        "context_size": info.context_length,
        "prepend_bos": info.bos,
        "dataset_path": info.data,
    }
    if info.reads is not None:
        facts |= {"hook_name": hook_name(info.reads), "hook_head_index": info.reads.head}
    if info.target is not None and info.writes is not None:
        facts |= {"hook_name_out": hook_name(info.writes), "hook_head_index_out": info.writes.head}
    own = {"schema": SCHEMA, "bandwidth": d.bandwidth, "revision": info.revision}
    own |= {"data_digest": info.data_digest, "padding": info.padding}
    if taken := sorted(info.training.keys() & {*FACTS, *RENAMED, OWN, "sae_lens_version"}):
        raise OptionError(f"training facts {', '.join(taken)} have names that are taken; rename")
    metadata = {
        "sae_lens_version": VERSION,
        **{name: value for name, value in facts.items() if value is not None},
        **info.training,
        OWN: {name: value for name, value in own.items() if value is not None},
    }
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"training facts are no plain, finite JSON ({error})") from error
    config = {
        "architecture": next(name for name, value in ARCHITECTURES.items() if value == layout),
        "d_in": d.d_in,
        "d_sae": d.n,
        "dtype": str(d.W_e.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": d.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if flattened(info.reads) and info.reads is not None and info.reads.kind == "z":
        config["reshape_activations"] = "hook_z"
    if d.transcoder:
        config["d_out"] = d.d_out
    if d.k is not None:
        config |= {"k": d.k} | ({} if d.transcoder else {"rescale_acts_by_decoder_norm": False})
    return config


def write_tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    """The tensors of a dictionary, by SAELens's names."""
    names = {"W_e": "W_enc", "b_e": "b_enc", "W_d": "W_dec", "b_d": "b_dec"}
    if dictionary.nonlinearity == "gated":
        names["b_e"] = "b_gate"
    found = {names.get(name, name): value.detach() for name, value in dictionary.named_parameters()}
    if "W_skip" in found:
        found["W_skip"] = found["W_skip"].T
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}
