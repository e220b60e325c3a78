"""Making: the command ``dict cards``, cards as a page or as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab import OptionError
from circuitlab_feature_interactions.cards.measuring import card_data
from circuitlab_feature_interactions.cards.page import page
from circuitlab_feature_interactions.cards.vector import picture
from circuitlab_feature_interactions.states import make_folder, write_whole

if TYPE_CHECKING:
    from circuitlab import TracedModel


def feature_cards(
    model: TracedModel,
    *,
    dictionaries: Path,
    features: str = "top:12",
    data: Path | None = None,
    n_tokens: int = 20_000,
    context_length: int | None = None,
    output: Path = Path("cards.html"),
    seed: int = 0,
) -> dict[str, Any]:
    """Write a card of each latent; a file that stands there is replaced in one step.

    A name that ends in .html is that of a page, in .svg of a picture of all cards; one without an
    ending is a folder, with a picture ``LATENT.svg`` for each. All are static: no script, no link,
    nothing from elsewhere. The same options give the same bytes. See :func:`measuring.card_data`
    for the options and what is raised.

    Returns:
        Plain JSON: ``page``, the file or folder, ``tokens``, ``prompts``, ``warnings``, and by
        latent its ``density`` and the context dependence ``alone`` and ``hidden``, where it is
        active.

    Raises:
        OptionError: ``output`` has another ending.
        ResourceError: it cannot be written.
    """
    kind = output.suffix.lower()
    if kind not in (".html", ".svg", "") or (kind == "" and output.is_file()):
        raise OptionError(
            f"--output '{output}' is no page; let the name end in .html or .svg, or name a folder "
            f"for a picture of each card"
        )
    found = card_data(
        model,
        dictionaries=dictionaries,
        features=features,
        data=data,
        n_tokens=n_tokens,
        context_length=context_length,
        seed=seed,
    )
    make_folder(output.parent if kind else output)
    for path, content in _contents(found, output):
        write_whole(path, content.encode())
    told = {name: found[name] for name in ("tokens", "prompts", "warnings")}
    latents = [card["latent"] for card in found["cards"]]
    return {"page": str(output), **told, "latents": {c["name"]: _summary(c) for c in latents}}


def _contents(found: dict[str, Any], output: Path) -> Iterator[tuple[Path, str]]:
    """The files, and what is in them."""
    if output.suffix.lower() == ".html":
        yield output, page(found)
        return
    note = (
        f"{found['model']} · {found['data']} · {found['tokens']:,} tokens of "
        f"{found['prompts']:,} prompts · seed {found['seed']}"
    )
    if output.suffix:
        yield output, picture(found["cards"], note)
        return
    for pair in found["cards"]:
        yield output / f"{pair['latent']['name']}.svg", picture([pair], note)


def _summary(card: dict[str, Any]) -> dict[str, Any]:
    told = {"density": card["density"].get("density", 0.0)}
    for name in ("alone", "hidden"):
        if found := card.get("context", {}).get(name):
            told[name] = found["score"]
    return told
