"""Whether a dictionary fits a model, and how what it was trained on differs from its use."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from circuitlab.dictionaries.info import DictionaryInfo
from circuitlab.errors import SiteError
from circuitlab.plans import Locator

if TYPE_CHECKING:
    from circuitlab.dictionaries.dictionary import Dictionary
    from circuitlab.model import TracedModel
    from circuitlab.sites import Site


def check_fit(
    dictionary: Dictionary, model: TracedModel, use: DictionaryInfo | None = None
) -> list[str]:
    """See :meth:`Dictionary.check_for`."""
    info, use = dictionary.info, use or DictionaryInfo()
    if info.reads is None:
        raise SiteError(
            "the dictionary does not say which site it reads; set "
            "dictionary.info = DictionaryInfo(site='resid_post.3')"
        )
    for name, own, other in (
        ("site", info.site, use.site),
        ("target", info.target, use.target),
    ):
        if None not in (own, other) and own != other:
            raise SiteError(
                f"the dictionary was trained with {name} {own} and is used with {other}; "
                f"use it at {own}"
            )
    _check_width(model, info.reads, dictionary.d_in, "reads")
    if info.target is not None or not dictionary.transcoder:
        assert info.writes is not None
        _check_width(model, info.writes, dictionary.d_out, "writes")
    here = replace(use, model=use.model or model.name, revision=use.revision or model.revision)
    return info.differences(here)


def _check_width(model: TracedModel, site: Site, width: int, verb: str) -> None:
    locator = Locator(model.architecture)
    locator.check(site)
    found = math.prod(locator.shape(site, 1, 1))
    if found != width:
        raise SiteError(
            f"site {site} of {model.name} has {found} numbers, and the dictionary {verb} {width}; "
            f"it belongs to another model or site"
        )
