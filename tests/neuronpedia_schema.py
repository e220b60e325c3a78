"""The JSON schema of attribution graphs (draft 7), from the format's published description.

Required and optional fields are those of Neuronpedia's ``graph-schema.json``, version 1.0.0,
"Anthropic Attribution Graph". Fields beyond it are allowed, as there.
"""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT}
_WHOLE: dict[str, Any] = {"type": "integer"}
_NUMBER: dict[str, Any] = {"type": "number"}
_NUMBER_OR_NULL: dict[str, Any] = {"type": ["number", "null"]}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


_NODE = {
    "node_id": _TEXT,
    "feature": {"type": ["integer", "null"]},
    "layer": {"type": ["string", "integer"]},
    "ctx_idx": _WHOLE,
    "feature_type": _TEXT,
    "jsNodeId": _TEXT,
    "clerp": _TEXT,
    "influence": _NUMBER_OR_NULL,
    "activation": _NUMBER_OR_NULL,
    "qk_tracing_results": {"type": "object"},
}
_METADATA = _object(
    ["slug", "scan", "prompt_tokens", "prompt"],
    slug=_TEXT,
    scan=_TEXT,
    prompt_tokens=_TEXTS,
    prompt=_TEXT,
    feature_details={"type": "object"},
    node_threshold=_NUMBER,
    info=_object(
        [],
        description=_TEXT,
        creator_name=_TEXT,
        creator_url=_TEXT,
        source_urls=_TEXTS,
        generator=_object([], name=_TEXT, version=_TEXT, url=_TEXT, email=_TEXT),
        create_time_ms=_NUMBER,
    ),
    generation_settings={"type": "object"},
    pruning_settings={"type": "object"},
)

SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Anthropic Attribution Graph",
    **_object(
        ["metadata", "qParams", "nodes", "links"],
        metadata=_METADATA,
        qParams=_object(
            [],
            pinnedIds=_TEXTS,
            supernodes={"type": "array", "items": _TEXTS},
            linkType=_TEXT,
            clickedId=_TEXT,
            sg_pos=_TEXT,
        ),
        nodes={
            "type": "array",
            "items": _object(
                ["node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"],
                **_NODE,
            ),
        },
        links={
            "type": "array",
            "items": _object(
                ["source", "target", "weight"], source=_TEXT, target=_TEXT, weight=_NUMBER
            ),
        },
        qk_only_nodes={
            "type": "object",
            "additionalProperties": _object(
                ["node_id", "feature_type", "layer", "ctx_idx", "jsNodeId", "clerp"], **_NODE
            ),
        },
    ),
}
