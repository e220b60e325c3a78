"""DictionarySet: dictionaries of several sites of one model, trained together, in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab import (
    Dictionary,
    DictionaryInfo,
    ModelError,
    ResourceError,
    Site,
    read_dictionary,
    write_dictionary,
)
from circuitlab_feature_interactions.sites import (
    Pair,
    make_pair,
    pair_to_json,
    sites_of,
    written_by,
)
from circuitlab_feature_interactions.states import STATE, make_folder, write_whole

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: What a set is, beside the folders of its dictionaries.
SET = "set.json"
SCHEMA = "circuitlab-dictionary-set/1"


@dataclass(frozen=True, eq=False)
class DictionarySet:
    """Dictionaries that were trained together.

    Attributes:
        dictionaries: One of each site: an autoencoder, or a transcoder of what is read there.
        pairs: Sites with a part of the model between them.
        info: ``settings``, ``model``, ``history`` and ``statistics`` of the training, plain JSON.
        warnings: How the training differs from this use, one sentence each.
    """

    dictionaries: Mapping[Site, Dictionary]
    pairs: Sequence[Pair]
    info: Mapping[str, Any]
    warnings: Sequence[str] = ()


def write_set(dictionary_set: DictionarySet, folder: Path) -> None:
    """Write a set: each dictionary in a folder named as its site, and ``set.json`` as the last.

    Raises:
        ResourceError: it cannot be written.
    """
    make_folder(folder)
    for site, dictionary in dictionary_set.dictionaries.items():
        write_dictionary(dictionary, folder / str(site))
    document = {
        "format": SCHEMA,
        "pairs": [pair_to_json(pair) for pair in dictionary_set.pairs],
        "sites": [str(site) for site in sites_of(dictionary_set.pairs)],
        **dictionary_set.info,
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_whole(folder / SET, text.encode())


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What ``set.json`` says; None where there is none.

    Raises:
        ModelError: it is no set's, or damaged.
        ResourceError: it cannot be read.
    """
    try:
        found = json.loads((folder / SET).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ResourceError(
            f"'{folder / SET}' cannot be read: {error.strerror or error}; check its permissions"
        ) from error
    except ValueError as error:
        raise ModelError(f"'{folder / SET}' is not JSON ({error}); train the set again") from error
    if not isinstance(found, dict) or found.get("format") != SCHEMA:
        raise ModelError(f"'{folder / SET}' is not of a set of dictionaries of this version")
    return found


def read_set(
    folder: Path | str, model: TracedModel, use: DictionaryInfo | None = None
) -> DictionarySet:
    """The set in a folder, on the model's device.

    Args:
        folder: As ``circuitlab dict train`` wrote it.
        model: The model it is to be used on.
        use: What else it is used on, to be compared with the training.

    Raises:
        ModelError: there is no complete set in the folder, or it is damaged.
        SiteError: the model has no such site, or one of another width.
        ResourceError: a file cannot be read.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    if facts is None:
        fact = f"holds no {SET}"
        if (folder / STATE).exists():
            fact = "holds a training that is not complete"
        raise ModelError(
            f"folder '{folder}' {fact}; train one with circuitlab dict train --output '{folder}'"
        )
    pairs = [_read_pair(found, model, folder) for found in _list(facts, "pairs", folder)]
    dictionaries, warnings = {}, []
    for site, written in written_by(pairs).items():
        dictionary = read_dictionary(folder / str(site), device=model.device)
        wanted = (site, written, written != site)
        if (dictionary.info.reads, dictionary.info.writes, dictionary.transcoder) != wanted:
            kind = "autoencoder of" if written == site else f"transcoder to {written} from"
            raise ModelError(f"'{folder / str(site)}' is no {kind} {site}; train the set again")
        warnings += dictionary.check_for(model, use)
        dictionaries[site] = dictionary
    info = {key: value for key, value in facts.items() if key not in ("format", "pairs", "sites")}
    return DictionarySet(dictionaries, pairs, info, tuple(dict.fromkeys(warnings)))


def _read_pair(found: Any, model: TracedModel, folder: Path) -> Pair:
    route = found.get("route") if isinstance(found, dict) else None
    layer = found.get("layer") if isinstance(found, dict) else None
    if route not in ("mlp", "block", "transcoder") or type(layer) is not int:
        raise ModelError(f"'{folder / SET}' holds {found!r} among its pairs; train the set again")
    pair = make_pair(route, layer, model)
    if pair_to_json(pair) != found:
        raise ModelError(
            f"'{folder / SET}' says {found['source']} to {found['target']} for {pair}, and it is "
            f"{pair.source} to {pair.target} in {model.name}; it belongs to another model"
        )
    return pair


def _list(facts: Mapping[str, Any], key: str, folder: Path) -> list[Any]:
    found = facts.get(key)
    if not isinstance(found, list) or not found:
        raise ModelError(f"'{folder / SET}' has no {key}; train the set again")
    return found
