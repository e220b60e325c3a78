"""DictionaryInfo: what a dictionary was trained on, and the names of sites in files of others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from circuitlab.errors import OptionError, SiteError
from circuitlab.labels import excerpt
from circuitlab.sites import BLOCK_KINDS, HEAD_KINDS, Site

#: How tokens that only fill up a batch were treated: there were none, they were left out, or not.
PADDING = ("none", "excluded", "included")

#: What TransformerLens calls the sites of a block; its names begin with ``blocks.{layer}.``.
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "hook_mlp_in",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_KINDS = {hook: kind for kind, hook in HOOKS.items()} | {"hook_z": "z"}
#: Sites of which a value has no fixed width, or that cannot be written.
_UNUSABLE = frozenset({"pattern", "logits"})

_OURS = re.compile(r"([a-z_]+)(?:\.(\d{1,6}))?(?:\.h(\d{1,6}))?")
_THEIRS = re.compile(r"blocks\.(\d{1,6}|\{layer\})\.([a-z0-9_.]+)")
_WANTED = (
    "write a site such as resid_post.3 (resid_pre.0 is the embeddings, resid_pre.1 comes after "
    "block 0) or a TransformerLens name such as blocks.3.hook_resid_post"
)


@dataclass(frozen=True, kw_only=True)
class DictionaryInfo:
    """What a dictionary was trained on; None where it is not known.

    Attributes:
        site: What it reads, as text of a :class:`circuitlab.Site` such as ``resid_post.3``; names
            of TransformerLens are understood and turned into it.
        target: What it writes, if that is another site.
        model: Name of the model.
        revision: Its commit or digest.
        context_length: Tokens per prompt in training.
        data: Name of the training text.
        data_digest: Digest of the training tokens.
        padding: ``none``, ``excluded`` or ``included``: whether there were tokens that only fill
            up a batch, and whether it was trained on them.
        bos: Whether prompts began with the tokenizer's token for that.
        training: Whatever else is known of the training, as plain JSON values.

    Raises:
        SiteError: a site's name is unknown or ambiguous, or it cannot have a dictionary.
        OptionError: another field has a value that does not fit.
    """

    site: str | None = None
    target: str | None = None
    model: str | None = None
    revision: str | None = None
    context_length: int | None = None
    data: str | None = None
    data_digest: str | None = None
    padding: str | None = None
    bos: bool | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("site", "target"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(parse_site(text)))
        if self.target is not None and self.target == self.site:
            raise OptionError(f"target {self.target} is the site itself; leave it out")
        if self.padding not in (None, *PADDING):
            raise OptionError(f"padding {self.padding!r} is none of {', '.join(PADDING)}")
        if self.context_length is not None and self.context_length < 1:
            raise OptionError(f"context_length {self.context_length} is not positive")

    @property
    def reads(self) -> Site | None:
        """The site it reads."""
        return None if self.site is None else parse_site(self.site)

    @property
    def writes(self) -> Site | None:
        """The site it writes: the target, or else what it reads."""
        return self.reads if self.target is None else parse_site(self.target)

    def differences(self, use: DictionaryInfo) -> list[str]:
        """How the training differs from a use, one warning each; what either does not say is not.

        Args:
            use: Where and on what the dictionary is to be used.
        """
        warnings = []
        for name, words in (
            ("model", "model"),
            ("revision", "revision of the model"),
            ("data_digest", "digest of the data"),
            ("padding", "treatment of padding"),
            ("bos", "beginning-of-sequence token"),
        ):
            trained, used = getattr(self, name), getattr(use, name)
            if None not in (trained, used) and trained != used:
                warnings.append(
                    f"the dictionary was trained with another {words}: {excerpt(str(trained))}, "
                    f"and is used with {excerpt(str(used))}"
                )
        trained, used = self.context_length, use.context_length
        if trained is not None and used is not None and used > trained:
            warnings.append(
                f"the dictionary was trained on {trained} tokens per prompt and is used on {used}: "
                f"look at its error by position, or shorten the prompts"
            )
        processed = self.training.get("model_from_pretrained_kwargs")
        flags = processed.items() if isinstance(processed, Mapping) else ()
        changes = sorted(str(name) for name, on in flags if on is True)
        if changes:
            warnings.append(
                f"the dictionary was trained on a model whose weights were processed "
                f"({', '.join(map(excerpt, changes))}): its inputs may differ from this model's"
            )
        return warnings


def parse_site(text: str, *, layer: int | None = None, head: int | None = None) -> Site:
    """The site of a name: a site's own text, or TransformerLens's name of it.

    Args:
        text: ``resid_post.3``, ``z.1.h0``, ``blocks.3.hook_resid_post``, ``hook_embed``.
        layer: Layer that a file states beside the name; it must agree with the name's.
        head: Head that a file states beside the name.

    Raises:
        SiteError: the name is unknown or ambiguous, or such a site cannot have a dictionary.
    """
    shown = f"site '{excerpt(text)}'"
    if text == "hook_embed":
        # Files that must name a layer say 0 here.
        kind, own_layer, own_head, layer = "embed", None, None, None
    elif found := _THEIRS.fullmatch(text):
        kind, own_head = _KINDS.get(found[2], ""), None
        own_layer = layer if found[1] == "{layer}" else int(found[1])
    elif found := _OURS.fullmatch(text):
        kind, own_layer, own_head = found[1], _integer(found[2]), _integer(found[3])
    else:
        kind, own_layer, own_head = "", None, None
    if kind in BLOCK_KINDS and own_layer is None:
        raise SiteError(f"{shown} is ambiguous: it says no layer; {_WANTED}")
    if kind in _UNUSABLE:
        raise SiteError(f"{shown} cannot have a dictionary; {_WANTED}")
    if kind != "embed" and kind not in HOOKS:
        known = ", ".join(("hook_embed", *HOOKS.values()))
        raise SiteError(f"{shown} is unknown; {_WANTED}; known hooks are {known}")
    if layer not in (None, own_layer):
        raise SiteError(f"{shown} is ambiguous: layer {layer} stands beside it; correct one")
    if None not in (head, own_head) and head != own_head:
        raise SiteError(f"{shown} is ambiguous: head {head} stands beside it; correct one")
    return Site(kind, own_layer, own_head if head is None else head)


def hook_name(site: Site) -> str:
    """What TransformerLens calls a site; a head has no name there, it is a number beside it."""
    return "hook_embed" if site.kind == "embed" else f"blocks.{site.layer}.{HOOKS[site.kind]}"


def flattened(site: Site | None) -> bool:
    """Whether a dictionary of this site reads all heads side by side."""
    return site is not None and site.kind in HEAD_KINDS and site.head is None


def _integer(text: str | None) -> int | None:
    return None if text is None else int(text)
