"""What a ``cfg.json`` of SAELens says, read with distrust: every key is known, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuitlab.dictionaries.info import DictionaryInfo, flattened, parse_site
from circuitlab.dictionaries.layout import (
    ARCHITECTURES,
    FACTS,
    OWN,
    RENAMED,
    SCHEMA,
    TRAINING,
    TYPES,
    Layout,
)
from circuitlab.errors import ModelError
from circuitlab.labels import excerpt

#: More latents, or a greater width, than any file holds.
_LARGEST = 1 << 40
#: What our own section says of the training, beside what SAELens has keys for.
_OWN_TEXTS = ("revision", "data_digest", "padding")


def parse_config(document: Any) -> Layout:
    """What a ``cfg.json`` says.

    Raises:
        ModelError: a key or a value is missing, not known or not supported; it is named.
        SiteError: the site's name is unknown or ambiguous.
    """
    if not isinstance(document, dict):
        raise ModelError("it holds no JSON object; give the folder that SAELens wrote")
    config = _renamed(document)
    metadata = _renamed(_typed("metadata", config.pop("metadata", {}), dict))
    own = _own(_typed(f"metadata.{OWN}", metadata.pop(OWN, {}), dict))
    facts = {name: config.pop(name) for name in FACTS if name in config}
    for name, value in facts.items():
        if metadata.setdefault(name, value) != value:
            raise ModelError(f"{name} stands at the top and under metadata, and differs")
    # Where it was trained, which says nothing.
    config.pop("device", None)
    layout = _computation(config)
    if unknown := sorted(config.keys() - TRAINING):
        raise ModelError(
            f"unknown keys {', '.join(map(excerpt, unknown))}; if they do not change what it "
            f"computes, move them under metadata"
        )
    info = _info(metadata, config, own)
    if layout.pop("heads_side_by_side") and not flattened(info.reads):
        raise ModelError(f"reshape_activations is hook_z, and the site is {info.site}; correct one")
    return Layout(own=own, info=info, **layout)


def _own(section: dict[str, Any]) -> dict[str, Any]:
    """The section that SAELens does not know, checked."""
    if not section:
        return {}
    if section.get("schema") != SCHEMA:
        raise ModelError(f"metadata.{OWN} has schema {_shown(section.get('schema'))}, not {SCHEMA}")
    kinds = {"schema": str, "weights_sha256": str, "bandwidth": float}
    kinds |= dict.fromkeys(_OWN_TEXTS, str)
    if unknown := sorted(section.keys() - kinds):
        raise ModelError(f"metadata.{OWN} has unknown keys {', '.join(map(excerpt, unknown))}")
    return {name: _typed(f"metadata.{OWN}.{name}", section[name], kinds[name]) for name in section}


def _computation(config: dict[str, Any]) -> dict[str, Any]:
    """What decides what the dictionary computes; its keys are taken out of ``config``."""
    nonlinearity, transcoder, skip = _architecture(config)
    d_in = _size(config, "d_in", None)
    factor = config.get("expansion_factor")
    n = _size(config, "d_sae", d_in * factor if type(factor) is int else None)
    d_out = _size(config, "d_out", d_in) if transcoder else d_in
    kwargs = _typed("activation_fn_kwargs", config.pop("activation_fn_kwargs", None) or {}, dict)
    activation = config.pop("activation_fn", "relu")
    if (nonlinearity, activation) == ("relu", "topk"):
        nonlinearity = "topk"
    topk = nonlinearity == "topk"
    allowed = {"k"} if topk else set()
    if activation not in ("relu", "topk" if topk else "relu") or kwargs.keys() - allowed:
        raise ModelError(
            f"activation_fn {_shown(activation)} with {_shown(kwargs)} is not supported; there are "
            f"relu and topk with k"
        )
    k = config.pop("k", kwargs.get("k")) if topk else None
    if topk and not (type(k) is int and 1 <= k <= n):
        raise ModelError(f"k is {_shown(k)}; it must be 1 to {n}, the number of latents")
    apply = _flag(config, "apply_b_dec_to_input", not transcoder)
    if transcoder and apply:
        raise ModelError("apply_b_dec_to_input is true, which a transcoder cannot do")
    dtype = _typed("dtype", config.pop("dtype", "float32"), str)
    if dtype not in TYPES:
        raise ModelError(f"dtype {_shown(dtype)} is unknown; there are {', '.join(sorted(TYPES))}")
    rescale = _flag(config, "rescale_acts_by_decoder_norm", False)
    if rescale and not topk:
        raise ModelError("rescale_acts_by_decoder_norm is true, and it is no topk dictionary")
    reshape = config.pop("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise ModelError(f"reshape_activations {_shown(reshape)} is not supported")
    return {
        "nonlinearity": nonlinearity,
        "transcoder": transcoder,
        "skip": skip,
        "d_in": d_in,
        "n": n,
        "d_out": d_out,
        "k": k,
        "apply_b_dec_to_input": apply,
        "rescale": rescale,
        "finetuned": _flag(config, "finetuning_scaling_factor", False),
        "scaled": _scaled(config, transcoder),
        "heads_side_by_side": reshape == "hook_z",
    }


def _architecture(config: dict[str, Any]) -> tuple[str, bool, bool]:
    name = config.pop("architecture", "standard")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"architecture {_shown(name)} is unknown; there are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _scaled(config: dict[str, Any], transcoder: bool) -> bool:
    """Whether activations were multiplied by a constant, the only normalisation that folds."""
    how = config.pop("normalize_activations", "none")
    if how is None or how is False or how == "none":
        return False
    if (how is True or how == "expected_average_only_in") and not transcoder:
        return True
    raise ModelError(
        f"normalize_activations {_shown(how)} is not supported"
        f"{' for a transcoder' if transcoder else ''}; only a constant scale can be folded into "
        f"the weights"
    )


def _info(
    metadata: dict[str, Any], training: dict[str, Any], own: Mapping[str, Any]
) -> DictionaryInfo:
    """What it was trained on; all that has no field of its own is kept under ``training``."""
    facts = {name: metadata.pop(name, None) for name in FACTS}
    metadata.pop("sae_lens_version", None)
    training.pop("sae_lens_version", None)
    sites = {}
    for name, suffix in (("site", ""), ("target", "_out")):
        hook = facts[f"hook_name{suffix}"]
        layer, head = facts[f"hook_layer{suffix}"], facts[f"hook_head_index{suffix}"]
        if hook is not None:
            numbers = {
                "layer": _optional(f"hook_layer{suffix}", layer, int),
                "head": _optional(f"hook_head_index{suffix}", head, int),
            }
            sites[name] = str(parse_site(_typed(f"hook_name{suffix}", hook, str), **numbers))
    context = _optional("context_size", facts["context_size"], int)
    if context is not None and context < 1:
        raise ModelError(f"context_size is {context}; it must be positive")
    return DictionaryInfo(
        **sites,
        **{name: own[name] for name in _OWN_TEXTS if name in own},
        model=_optional("model_name", facts["model_name"], str),
        context_length=context,
        data=_optional("dataset_path", facts["dataset_path"], str),
        bos=_optional("prepend_bos", facts["prepend_bos"], bool),
        training={**training, **metadata},
    )


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        new = RENAMED.get(name, name)
        if found.setdefault(new, value) != value:
            raise ModelError(f"{name} and {new} say the same thing, and differ")
    return found


def _size(config: dict[str, Any], name: str, default: int | None) -> int:
    value = config.pop(name, None)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ModelError(f"{name} is {_shown(value)}; it must be an integer of 1 to {_LARGEST}")
    return value


def _flag(config: dict[str, Any], name: str, default: bool) -> bool:
    value: bool = _typed(name, config.pop(name, default), bool)
    return value


def _optional(name: str, value: Any, kind: type) -> Any:
    return None if value is None else _typed(name, value, kind)


def _typed(name: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ModelError(f"{name} is {_shown(value)}; it must be of type {kind.__name__}")
    return value


def _shown(value: Any) -> str:
    return excerpt(repr(value), 60)
