"""Encoder: one prompt or answer as token ids, checked against the model that will read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from circuitlab.errors import TaskError
from circuitlab.labels import excerpt
from circuitlab.tasks import Answer, Prompt

#: How tokenizers write a space and a line end inside a token.
_MARKS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each id as readable text; ``#id`` where there is none."""
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    texts = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        f"#{i}" if text is None else str(text).translate(_MARKS)
        for i, text in zip(ids, texts, strict=True)
    ]


class Tokenizer(Protocol):
    """As much of a Hugging Face tokenizer as encoding needs."""

    @property
    def bos_token_id(self) -> int | None:
        """What begins every prompt."""

    @property
    def eos_token_id(self) -> int | None:
        """What ends a text."""

    @property
    def unk_token_id(self) -> int | None:
        """What stands for a word that is not in the vocabulary."""

    def __call__(self, text: str) -> Mapping[str, Any]:
        """``input_ids`` of a text."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Any:
        """The tokens behind ids."""


class Encoder:
    """A tokenizer, or none, and the limits of the model that will read the ids."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, n_positions: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        probe = [] if tokenizer is None else self._ids("a")
        # What the tokenizer adds by itself shows on a text that asks for no special token.
        self.bos = None if tokenizer is None else _if_in(tokenizer.bos_token_id, probe[:1])
        self.eos = None if tokenizer is None else _if_in(tokenizer.eos_token_id, probe[1:][-1:])
        self._answer_cache: dict[str, int] = {}

    def tokens(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Each id as readable text; the id itself where there is no text for it."""
        if self.tokenizer is None:
            return tuple(str(i) for i in ids)
        return tuple(token_texts(self.tokenizer, ids))

    def shown(self, ids: Sequence[int]) -> str:
        """The tokens in one line of a message."""
        return excerpt("[" + "|".join(self.tokens(ids)) + "]", 160)

    def prompt(self, prompt: Prompt, where: str) -> list[int]:
        """Ids of a prompt, checked against the model."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TaskError(
                    f"{where} is text, but the model has no tokenizer; write it as token ids"
                )
            ids = self._ids(prompt)
            ids = ids[:-1] if self.eos is not None and ids[-1:] == [self.eos] else ids
            if not self._body(ids):
                raise TaskError(f"{where} {quoted(prompt)} holds no token; write at least one")
            if self._has_unknown(prompt, ids):
                words = [w for w in dict.fromkeys(prompt.split()) if self._unknown_word(w)]
                named = ", ".join(quoted(word) for word in words[:5] or [prompt])
                raise TaskError(
                    f"{where} holds words the tokenizer does not know: {named}; "
                    f"tokens are {self.shown(ids)}; use words of its vocabulary"
                )
        else:
            ids = list(prompt)
            if not ids:
                raise TaskError(f"{where} is empty; write at least one token")
        self._check_range(ids, where)
        if len(ids) > self.n_positions:
            raise TaskError(
                f"{where} has {len(ids)} tokens, the model reads at most {self.n_positions}; "
                f"shorten it or leave the pair out; tokens are {self.shown(ids)}"
            )
        return ids

    def oddities(self, prompt: Prompt, ids: list[int]) -> Iterator[str]:
        """What is odd about an encoded prompt, in words that fit any pair."""
        if self.bos is not None:
            name = self.tokens([self.bos])[0]
            if ids[:2] == [self.bos, self.bos]:
                yield f"begins with BOS {name!r} twice; the tokenizer adds it, leave it out"
            if ids[0] != self.bos:
                yield f"does not begin with BOS {name!r}, which the tokenizer adds to text"
        if (
            isinstance(prompt, str)
            and prompt.endswith(" ")
            and prompt.strip()
            and self._ids(prompt) != self._ids(prompt.rstrip())
        ):
            yield (
                "ends in a space, which becomes a token of its own; "
                "leave it out and begin the answer with it"
            )

    def answer(self, answer: Answer, where: str) -> int:
        """Id of an answer, checked against the vocabulary."""
        if isinstance(answer, int):
            self._check_range([answer], where)
            return answer
        if answer not in self._answer_cache:
            self._answer_cache[answer] = self._answer_id(answer, where)
        return self._answer_cache[answer]

    def lacks_space(self, answer: Answer) -> bool:
        """Whether a leading space would make the word another single token."""
        if not isinstance(answer, str) or not answer[0].isalpha():
            # Digits and punctuation often do continue the last token: no space is meant.
            return False
        spaced = self._single(" " + answer)
        return spaced is not None and spaced != self._single(answer)

    def _answer_id(self, answer: str, where: str) -> int:
        if self.tokenizer is None:
            raise TaskError(f"{where} is text, but the model has no tokenizer; write its token id")
        single = self._single(answer)
        if single is not None:
            self._check_range([single], where)
            return single
        ids = self._body(self._ids(answer))
        if self._has_unknown(answer, ids):
            fact = f"is not in the vocabulary: its tokens are {self.shown(ids)}"
        else:
            fact = f"is {len(ids)} tokens {self.shown(ids)}, not one"
        others = (" " + answer.strip(), answer.strip())
        fits = [other for other in others if other and self._single(other) is not None]
        remedy = (
            f"write {quoted(fits[0])}, which is one token"
            if fits
            else "choose an answer that is one token"
        )
        raise TaskError(f"{where} {quoted(answer)} {fact}; {remedy}")

    def _single(self, text: str) -> int | None:
        ids = self._body(self._ids(text))
        return ids[0] if len(ids) == 1 and not self._has_unknown(text, ids) else None

    def _ids(self, text: str) -> list[int]:
        assert self.tokenizer is not None  # for the type checker: callers have looked
        return [int(i) for i in self.tokenizer(text)["input_ids"]]

    def _body(self, ids: list[int]) -> list[int]:
        """The ids without what the tokenizer adds by itself."""
        start = int(self.bos is not None and ids[:1] == [self.bos])
        stop = len(ids) - int(self.eos is not None and ids[start:][-1:] == [self.eos])
        return ids[start:stop]

    def _has_unknown(self, text: str, ids: list[int]) -> bool:
        """Whether the unknown token stands for something, rather than being written out."""
        unknown = None if self.tokenizer is None else self.tokenizer.unk_token_id
        if unknown is None or self.tokenizer is None:
            return False
        written = text.count(str(self.tokenizer.convert_ids_to_tokens([unknown])[0]))
        # GPT-2 has one token for unknown, BOS and EOS.
        added = int(unknown == self.bos and ids[:1] == [self.bos])
        return ids.count(unknown) > written + added

    def _unknown_word(self, word: str) -> bool:
        return self._has_unknown(word, self._body(self._ids(word)))

    def _check_range(self, ids: list[int], where: str) -> None:
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise TaskError(
                    f"{where} holds token id {i}, the model's vocabulary has {self.vocab_size} "
                    f"(ids 0 to {self.vocab_size - 1}); use its own tokenizer and ids"
                )


def quoted(text: str) -> str:
    """The text in double quotes, so that a space at either end shows."""
    return f'"{excerpt(text, 60)}"'


def _if_in(token: int | None, ids: list[int]) -> int | None:
    return token if token is not None and token in ids else None
