"""Making: the command ``dict cards``, one page of cards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab import OptionError
from circuitlab_feature_interactions.cards.measuring import card_data
from circuitlab_feature_interactions.cards.page import page
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
    """Write a page with a card of each latent; a file that stands there is replaced in one step.

    The page is one static file: no script, no link, nothing from elsewhere. The same options give
    the same bytes. See :func:`measuring.card_data` for the options and what is raised.

    Returns:
        Plain JSON: ``page``, ``tokens``, ``prompts``, ``warnings``, and by latent its ``density``
        and the context dependence ``alone`` and ``hidden``, where it is active.

    Raises:
        OptionError: ``output`` is no ``.html``.
        ResourceError: it cannot be written.
    """
    if output.suffix.lower() != ".html":
        raise OptionError(f"--output '{output}' is no page; let the name end in .html")
    found = card_data(
        model,
        dictionaries=dictionaries,
        features=features,
        data=data,
        n_tokens=n_tokens,
        context_length=context_length,
        seed=seed,
    )
    make_folder(output.parent)
    write_whole(output, page(found).encode())
    told = {name: found[name] for name in ("tokens", "prompts", "warnings")}
    latents = [card["latent"] for card in found["cards"]]
    return {"page": str(output), **told, "latents": {c["name"]: _summary(c) for c in latents}}


def _summary(card: dict[str, Any]) -> dict[str, Any]:
    told = {"density": card["density"].get("density", 0.0)}
    for name in ("alone", "hidden"):
        if found := card.get("context", {}).get(name):
            told[name] = found["score"]
    return told
