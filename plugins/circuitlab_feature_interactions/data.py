"""Prompts to train on: an endless stream of token ids, of which any part can be asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitlab import OptionError, TaskError, Tokens, read_texts

if TYPE_CHECKING:
    from circuitlab import TracedModel

#: Prompts of a model's own corpus that are made at a time.
CHUNK = 1024
#: Seeds of the corpus from here on are for training; those below are never seen in it.
FIRST_SEED = 1 << 32

_PRIME = (1 << 61) - 1


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, the same for the same numbers; below 2^62."""
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _PRIME


def generator_of(*numbers: int) -> torch.Generator:
    """A generator on the CPU that draws the same for the same numbers."""
    return torch.Generator().manual_seed(seed_of(*numbers))


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts of one length limit, all of them: token ids side by side.

    Attributes:
        ids: All ids, ``[total]``, int32.
        starts: Where each prompt begins, and where the last one ends, ``[n + 1]``.
    """

    ids: Tensor
    starts: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> Texts:
        """These prompts."""
        lengths = torch.tensor([0, *map(len, prompts)])
        flat = torch.tensor([i for prompt in prompts for i in prompt], dtype=torch.int32)
        return cls(flat, lengths.cumsum(0))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[int(self.starts[index]) : int(self.starts[index + 1])]

    def digest(self) -> str:
        """SHA-256 of the ids and of where the prompts begin."""
        found = hashlib.sha256(self.ids.numpy().tobytes())
        found.update(self.starts.numpy().tobytes())
        return found.hexdigest()


class PromptStream:
    """Prompts without end; ``stream[n]`` are the ids of the n-th, the same for the same seed.

    Of a file, all prompts come once, in another order each time through. A bundled model's own
    corpus gives new ones all the time, by seeds from :data:`FIRST_SEED` on. Longer texts are cut
    into windows of ``context_length`` tokens, one behind the other; where the tokenizer begins a
    text with BOS, each window begins with it.

    Args:
        model: Whose tokenizer reads the texts, and whose corpus is taken where there is no file.
        data: File of texts, as :func:`circuitlab.read_texts` takes; None for the model's corpus.
        context_length: Most tokens of a prompt; None: as many as the model reads.
        seed: For the order, or for the corpus.

    Attributes:
        context_length: Most tokens of a prompt.
        name: Of the data, for people.
        digest: SHA-256 of the data's tokens; of the corpus, of its first prompts of seed 0.
        bos: Whether prompts begin with BOS.
        repeats: Prompts after which the data begins again; None for a corpus.

    Raises:
        OptionError: the context length does not fit the model.
        TaskError: the file is missing, empty or malformed, or holds a text that cannot be read.
        ModelError: there is no file, and the model has no corpus.
    """

    def __init__(
        self, model: TracedModel, data: Path | None, context_length: int | None, seed: int
    ) -> None:
        limit = model.n_positions if context_length is None else context_length
        if not 1 <= limit <= model.n_positions:
            raise OptionError(
                f"context length {limit} does not fit: {model.name} reads 1 to "
                f"{model.n_positions} tokens"
            )
        self.context_length = limit
        self._model, self._seed = model, seed
        self._prefix = _prefix(model)
        if self._prefix and limit == 1:
            raise OptionError("context length 1 leaves room for BOS alone; give 2 or more")
        self.bos = bool(self._prefix)
        prompts = model.corpus(CHUNK) if data is None else read_texts(data)
        self.name = f"corpus of {model.name}" if data is None else data.name
        texts = self._cut(prompts)
        self.digest = texts.digest()
        self.repeats = None if data is None else len(texts)
        self._all = None if data is None else texts
        self._chunk = lru_cache(maxsize=2)(self._make_chunk)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __getitem__(self, number: int) -> Tensor:
        if self._all is None:
            # A chunk may hold more prompts than texts were asked for, never fewer.
            return self._chunk(number // CHUNK)[number % CHUNK]
        epoch, place = divmod(number, len(self._all))
        return self._all[int(self._order(epoch)[place])]

    def facts(self) -> dict[str, Any]:
        """What there is to say of the data in a :class:`circuitlab.DictionaryInfo`."""
        return {
            "data": self.name,
            "data_digest": self.digest,
            "context_length": self.context_length,
            "padding": "excluded",
            "bos": self.bos,
        }

    def _make_chunk(self, chunk: int) -> Texts:
        seed = FIRST_SEED + seed_of(self._seed, chunk)
        return self._cut(self._model.corpus(CHUNK, seed))

    def _draw_order(self, epoch: int) -> Tensor:
        assert self._all is not None
        return torch.randperm(len(self._all), generator=generator_of(self._seed, epoch))

    def _cut(self, prompts: Sequence[Any]) -> Texts:
        """The prompts as windows of ids; order kept."""
        return Texts.of([w for prompt in self._ids(prompts) for w in self._windows(prompt)])

    def _ids(self, prompts: Sequence[Any]) -> Iterator[list[int]]:
        """Ids of each prompt, without what the tokenizer adds."""
        tokenizer, model = self._model.tokenizer, self._model
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str):
                ids = list(prompt)
                model.tokens([tuple(ids[:1])])
                if min(ids) < 0 or max(ids) >= model.vocab_size:
                    raise TaskError(
                        f"text {number} of the data holds token {max(ids)}; ids of {model.name} "
                        f"run from 0 to {model.vocab_size - 1}"
                    )
                yield ids
                continue
            if tokenizer is None:
                raise TaskError(
                    f"text {number} of the data is text, and {model.name} has no tokenizer; write "
                    f"token ids, in a .jsonl file"
                )
            found = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            if not found or tokenizer.unk_token_id in found:
                model.tokens([prompt])  # says which word it is, where unknown words are refused
            yield list(found)

    def _windows(self, ids: list[int]) -> Iterator[list[int]]:
        given = self._prefix == ids[: len(self._prefix)]
        prefix = [] if given else self._prefix
        yield prefix + ids[: self.context_length - len(prefix)]
        step = self.context_length - len(self._prefix)
        for start in range(self.context_length - len(prefix), len(ids), step):
            yield self._prefix + ids[start : start + step]


def pad(prompts: Sequence[Tensor], device: torch.device) -> Tokens:
    """Prompts as a batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return Tokens(ids, mask).to(device)


def _prefix(model: TracedModel) -> list[int]:
    """What the tokenizer puts in front of a text: BOS, or nothing."""
    if model.tokenizer is None:
        return []
    bos: Any = model.tokenizer.bos_token_id
    ids: Any = model.tokenizer("a")["input_ids"]
    return [int(bos)] if bos is not None and ids[:1] == [bos] else []
