"""Steering: the vectors that a scan adds to the residual stream, where they come from and go."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from circuitlab import OptionError, Site, TaskError, choose_batch_size, read_dictionary
from circuitlab_activation_plateaus.pushes.directions import stream_activations

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import Dictionary, EncodedTask, Tokens, TracedModel

Source = Literal["mean-difference", "pca", "dictionary", "act-add", "random"]
Positions = Literal["all", "last", "front"]
Prompts = Literal["clean", "corrupt"]

#: Vectors shorter than this share of the mean stream norm are rounding.
SHORT = 1e-6
_SITE = re.compile(r"(resid_pre|resid_mid|resid_post)\.(\d{1,6})")


@dataclass(frozen=True)
class Steering:
    """Vectors to add to the residual stream at one site.

    Attributes:
        name: What they are, in words.
        site: Where they are added.
        vectors: ``[n, d_model]``, float64: one, or those of the first ``n`` positions.
        raw_length: Their norm before they were scaled, mean over those that are not 0.
        stream_norm: Mean norm of the residual stream at the last position there.
        warnings: What is odd about them.
    """

    name: str
    site: Site
    vectors: Tensor
    raw_length: float
    stream_norm: float
    warnings: tuple[str, ...] = ()

    @property
    def length(self) -> float:
        """Norm of what coefficient 1 adds, mean over positions that are not 0."""
        return _length(self.vectors)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where the vectors come from.

    Attributes:
        source: ``mean-difference``: mean over pairs of the stream at the last position, corrupt
            less clean. ``pca``: a principal component of the stream there, over both prompts of
            every pair, or over ``corpus`` texts at every position but the first; as long as the
            standard deviation along it, and pointing as the mean difference does. ``dictionary``:
            what a latent writes. ``act-add``: the stream of prompt ``towards`` less that of prompt
            ``away`` (Turner et al. 2023, arXiv:2308.10248). ``random``: isotropic.
        index: Which principal component, or latent, from 0.
        corpus: Of how many of the model's own texts ``pca`` is taken; 0 is the task's prompts.
        dictionary: Folder of a dictionary of the site.
        towards: Prompt of ``act-add``.
        away: The other one.
    """

    source: Source = "mean-difference"
    index: int = 0
    corpus: int = 0
    dictionary: Path | None = None
    towards: str | None = None
    away: str | None = None

    def check(self) -> None:
        """Refuse settings that the source does not take, or lacks.

        Raises:
            OptionError: names the flag.
        """
        needs = {"act-add": ("towards", "away"), "dictionary": ("dictionary",)}
        takes = {"pca": ("index", "corpus"), "dictionary": ("index",)}
        for name in needs.get(self.source, ()):
            if getattr(self, name) is None:
                raise OptionError(f"--direction {self.source} needs --{name}; give it")
        own = (*needs.get(self.source, ()), *takes.get(self.source, ()))
        for name in ("towards", "away", "dictionary", "index", "corpus"):
            if name not in own and getattr(self, name):
                raise OptionError(f"--{name} says nothing to --direction {self.source}; leave it")
        for name in ("index", "corpus"):
            if getattr(self, name) < 0:
                raise OptionError(f"--{name} {getattr(self, name)} is negative; give 0 or more")


def steering(
    model: TracedModel,
    pairs: EncodedTask,
    choice: Choice,
    *,
    site: str | None = None,
    positions: Positions = "all",
    unit: Literal["stream", "raw"] = "stream",
    prompts: Prompts = "clean",
    batch_size: int | None = None,
) -> Steering:
    """The vectors that a choice means.

    Args:
        model: Any traced model.
        pairs: The task.
        choice: Where they come from.
        site: ``resid_pre.3`` or another residual stream; None is that of the dictionary, else one
            in the middle.
        positions: With ``front``, ``act-add`` gives a vector for each of its prompts' positions;
            else, as all others do, one for the last position.
        unit: ``stream``: as long as the mean norm of the stream at the last position of the prompts
            that are steered, so that a coefficient is in units of it; several vectors are scaled
            together to have it as mean norm. ``raw``: as they are; ``random`` is as in ``stream``.
        prompts: Which prompts are steered.
        batch_size: Pairs per pass; None chooses by memory.

    Raises:
        OptionError: the site cannot be steered, or the source gives no vector there.
        SiteError: the model has no such site, or the dictionary another one.
        TaskError: a prompt of ``act-add`` cannot be encoded.
        ModelError: the dictionary cannot be read, or the model has no texts of its own.
    """
    choice.check()
    dictionary = None if choice.dictionary is None else read_dictionary(choice.dictionary)
    place, warnings = _place(model, site, dictionary)
    size = choose_batch_size(model, pairs, batch_size)
    norm = float(_last(model, getattr(pairs, prompts), place, size).norm(dim=-1).mean())
    if not norm > 0:
        raise OptionError(f"the residual stream at {place} is 0: nothing to measure against")
    if choice.source == "random":
        vectors = torch.randn(1, model.d_model, dtype=torch.float64)
        vectors = norm * vectors / vectors.norm()
    elif dictionary is not None:
        vectors = _decoder_row(dictionary, choice.index)
    elif choice.source == "act-add":
        vectors = _act_add(model, choice, place, positions)
    else:
        vectors = _of_pairs(model, pairs, choice, place, size)
    vectors = vectors.to(model.device)
    raw = _length(vectors)
    if not raw > SHORT * norm:
        raise OptionError(
            f"--direction {choice.source} at {place} has length {raw:.2g}, the stream there "
            f"{norm:.3g}: there is nothing to add; choose another source, site or prompts"
        )
    scale = norm / raw if unit == "stream" else 1.0
    return Steering(_name(choice), place, scale * vectors, raw, norm, tuple(warnings))


def random_like(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Isotropic random vectors, each as long as the one it stands for, ``[n, d_model]``."""
    drawn = torch.randn(vectors.shape, dtype=torch.float64, generator=generator)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True)
    scaled: Tensor = drawn.to(vectors) * vectors.norm(dim=-1, keepdim=True)
    return scaled


def placed(vectors: Tensor, tokens: Tokens, positions: Positions) -> Tensor:
    """What coefficient 1 adds to each prompt's stream, ``[batch, pos, d_model]``; 0 at padding.

    Args:
        vectors: ``[n, d_model]``.
        tokens: The prompts.
        positions: ``all``: one vector at every token. ``last``: at the last. ``front``: the vectors
            from the first token on.

    Raises:
        OptionError: a prompt has fewer tokens than there are vectors.
    """
    mask = tokens.mask
    if positions == "all":
        return mask[..., None] * vectors[0]
    added = vectors.new_zeros(*mask.shape, vectors.shape[-1])
    if positions == "last":
        added[:, -1] = vectors[0]
        return added
    lengths = mask.sum(-1)
    shortest = int(lengths.min())
    if shortest < len(vectors):
        raise OptionError(
            f"--positions front adds {len(vectors)} vectors, and the shortest prompt has "
            f"{shortest} tokens; give shorter --towards and --away, or --positions last"
        )
    rows = torch.arange(len(mask), device=mask.device)
    for place, vector in enumerate(vectors):
        added[rows, mask.shape[1] - lengths + place] = vector
    return added


def read_prompt(model: TracedModel, text: str, flag: str) -> Tokens:
    """A prompt given as an option; token ids, as ``3, 17``, for a model without a tokenizer.

    Raises:
        TaskError: it cannot be encoded; names the flag.
    """
    return model.tokens([prompt_of(model, text, flag)])


def prompt_of(model: TracedModel, text: str, flag: str) -> str | tuple[int, ...]:
    """A text as a prompt of this model: itself, or the token ids it lists.

    Raises:
        TaskError: the model has no tokenizer, and the text is no list of ids.
    """
    if model.tokenizer is not None:
        return text
    try:
        return tuple(int(part) for part in re.split(r"[\s,]+", text.strip()))
    except ValueError as error:
        raise TaskError(
            f"{flag} {text!r}: the model has no tokenizer; write token ids, as '3, 17'"
        ) from error


# --- the site and the sources ---------------------------------------------------------------------


def _place(
    model: TracedModel, text: str | None, dictionary: Dictionary | None
) -> tuple[Site, list[str]]:
    """The site, and what is odd about the dictionary."""
    warnings: list[str] = []
    written = None
    if dictionary is not None:
        warnings = dictionary.check_for(model)
        written = dictionary.info.writes
        if dictionary.transcoder and dictionary.info.target is None:
            raise OptionError("the transcoder does not say which site it writes; name its target")
        text = text or str(written)
    text = text or _middle(model)
    found = _SITE.fullmatch(text)
    if found is None:
        raise OptionError(
            f"site {text!r} cannot be steered; give a residual stream as resid_pre.0, resid_mid.0 "
            f"or resid_post.0"
        )
    site = Site(found[1], int(found[2]))
    if written is not None and written != site:
        raise OptionError(f"--site {site}: the dictionary writes {written}; leave --site away")
    return site, warnings


def _middle(model: TracedModel) -> str:
    """A stream in the middle, which the last token alone does not yet decide."""
    if model.n_layers > 1:
        return f"resid_pre.{model.n_layers // 2}"
    return "resid_post.0" if model.wiring.parallel else "resid_mid.0"


def _last(model: TracedModel, tokens: Tokens, site: Site, size: int) -> Tensor:
    """The stream at the last position of each prompt, ``[n, d_model]``, float64."""
    parts = [tokens.rows(slice(i, i + size)) for i in range(0, len(tokens), size)]
    found = [model.run(part, read=[site], logits="none")[site][:, -1] for part in parts]
    return torch.cat(found).double()


def _of_pairs(
    model: TracedModel, pairs: EncodedTask, choice: Choice, site: Site, size: int
) -> Tensor:
    """The mean difference, or a principal component, ``[1, d_model]``."""
    clean, corrupt = (_last(model, part, site, size) for part in (pairs.clean, pairs.corrupt))
    difference = (corrupt - clean).mean(0, keepdim=True)
    if choice.source == "mean-difference":
        return difference
    rows = torch.cat([clean, corrupt])
    if choice.corpus:
        texts = model.tokens(model.corpus(choice.corpus, torch.initial_seed()))
        rows = stream_activations(model, [texts], site).double()
    component = _principal(rows, choice.index, site)
    along = float((component @ difference.T).sum())
    return component if along >= 0 else -component


def _principal(rows: Tensor, index: int, site: Site) -> Tensor:
    """A principal component of ``[n, d_model]``, as long as the standard deviation along it."""
    centred = rows - rows.mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    n_real = int((sizes > SHORT * sizes[0]).sum()) if float(sizes[0]) > 0 else 0
    if index >= n_real:
        raise OptionError(
            f"--index {index}: {len(rows)} activations at {site} have {n_real} principal "
            f"components; give a smaller one, or more prompts"
        )
    axis = axes[index]
    # The sign of a component is arbitrary; that of its largest entry settles it where nothing else
    # does.
    axis = axis * axis[axis.abs().argmax()].sign()
    component: Tensor = axis * sizes[index] / max(1, len(rows) - 1) ** 0.5
    return component[None]


def _decoder_row(dictionary: Dictionary, index: int) -> Tensor:
    if index >= dictionary.n:
        raise OptionError(f"--index {index}: the dictionary has latents 0 to {dictionary.n - 1}")
    return dictionary.W_d.detach()[index : index + 1].double()


def _act_add(model: TracedModel, choice: Choice, site: Site, positions: Positions) -> Tensor:
    """Activations of one prompt less those of another, ``[n, d_model]``."""
    streams = []
    for flag, text in (("--towards", choice.towards), ("--away", choice.away)):
        assert text is not None
        tokens = read_prompt(model, text, flag)
        streams.append(model.run(tokens, read=[site], logits="none")[site][0].double())
    if positions != "front":
        return streams[0][-1:] - streams[1][-1:]
    if len(streams[0]) != len(streams[1]):
        raise OptionError(
            f"--towards has {len(streams[0])} tokens, --away {len(streams[1])}: their positions do "
            f"not correspond; fill up the shorter one, or use --positions last"
        )
    return streams[0] - streams[1]


def _length(vectors: Tensor) -> float:
    """Mean norm of the vectors that are not 0; 0 where all are."""
    norms = vectors.norm(dim=-1)
    real = norms > SHORT * norms.max()
    return float(norms[real].mean()) if bool(real.any()) else 0.0


def _name(choice: Choice) -> str:
    where = f" of {choice.corpus} texts" if choice.corpus else ""
    return {
        "pca": f"principal component {choice.index}{where}",
        "dictionary": f"latent {choice.index}",
        "act-add": f"{choice.towards!r} - {choice.away!r}",
        "mean-difference": "mean difference corrupt - clean",
    }.get(choice.source, choice.source)
