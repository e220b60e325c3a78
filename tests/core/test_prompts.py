"""Prompts: encoding, padding and the checks at the door."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from circuitlab.errors import OptionError, SiteError, TaskError
from circuitlab.prompts import EncodedTask, encode_prompts, encode_task
from circuitlab.tasks import PromptPair, Task

CLEAN = "When Mary and John went to the store , John gave a drink to"
CORRUPT = "When Mary and John went to the store , Mary gave a drink to"
WORDS = dict.fromkeys(["[UNK]", "[BOS]", "[EOS]", *CLEAN.split(), "it"])
VOCAB = {word: i for i, word in enumerate(WORDS)}
END = "<|endoftext|>"
#: "Mary" begins sentences and "John" never does, so only the first is a token without its space;
#: other names in J make the pair (space, J) the more frequent one, so that it is merged first.
SENTENCES = ["Mary saw John", "Then Jack , Jill , James and John met Mary at the shop"] * 40


def wrap(core: Tokenizer, bos: str, eos: str, unk: str) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer around a bare one."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=core, bos_token=bos, eos_token=eos, unk_token=unk
    )


def word_tokenizer(template: str = "[BOS] $A", bos: str = "[BOS]") -> PreTrainedTokenizerFast:
    """Words as tokens, split at spaces; by default with an automatic BOS."""
    core = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(name, VOCAB[name]) for name in ("[BOS]", "[EOS]", "[UNK]")]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return wrap(core, bos, "[EOS]", "[UNK]")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: one token for BOS, EOS and unknown, none of them automatic."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    return wrap(core, END, END, END)


WORD = word_tokenizer()
BYTE = byte_tokenizer()

PAIR = PromptPair(CLEAN, CORRUPT, ("Mary",), ("John",))
IDS = PromptPair((3, 4, 5), (3, 6, 5), (7,), (8,))


def encode(
    *pairs: PromptPair, tokenizer: PreTrainedTokenizerFast | None = WORD, **options: Any
) -> EncodedTask:
    """The pairs as a task named ``t``, encoded for a model of 1000 tokens and 64 positions."""
    sizes = {"vocab_size": 1000, "n_positions": 64}
    return encode_task(tokenizer, Task("t", pairs), **{**sizes, **options})


def refusal(*pairs: PromptPair, **options: Any) -> str:
    """The one-line message with which the pairs are refused; exit code 3."""
    with pytest.raises(TaskError) as caught:
        encode(*pairs, **options)
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 3
    return str(caught.value)


def byte_pair(answer: str, wrong: str = " Jill", end: str = " met") -> PromptPair:
    """A pair whose answers are to be checked by the byte-level tokenizer."""
    return PromptPair(f"Then James{end}", f"Then John{end}", (answer,), (wrong,))


prompt_ids = st.lists(st.integers(0, 99), min_size=1, max_size=9).map(tuple)


@given(st.lists(prompt_ids, min_size=1, max_size=6))
@settings(deadline=None)
def test_left_padding(prompts: list[tuple[int, ...]]) -> None:
    """Each row ends in its prompt, counts its positions from 0, and is masked before that."""
    tokens = encode_prompts(None, prompts, vocab_size=100, n_positions=9)
    assert len(tokens) == len(prompts)
    assert tokens.ids.shape[1] == max(map(len, prompts))
    assert tokens.ids.dtype == torch.int64
    assert tokens.mask.dtype == torch.bool
    for i, prompt in enumerate(prompts):
        pad = tokens.ids.shape[1] - len(prompt)
        assert tokens.ids[i].tolist() == [0] * pad + list(prompt)
        assert tokens.mask[i].tolist() == [False] * pad + [True] * len(prompt)
        assert tokens.position_ids[i].tolist() == [0] * pad + list(range(len(prompt)))


def test_to_moves_every_tensor() -> None:
    """After ``to`` no tensor is left on the old device."""
    moved = encode(IDS, tokenizer=None).to("meta")
    prompts = [part for side in (moved.clean, moved.corrupt) for part in (side.ids, side.mask)]
    tensors = [*prompts, moved.answers.right, moved.answers.wrong]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_tokens_rows_and_repeat() -> None:
    """Rows keep two dimensions, and all rows repeat in their order."""
    tokens = encode_prompts(None, [(1,), (2, 3), (4,)], vocab_size=9, n_positions=9)
    assert tokens.rows(-1).ids.tolist() == [[0, 4]]
    assert tokens.rows(slice(1, 3)).ids.tolist() == [[2, 3], [0, 4]]
    assert tokens.rows([2, 0]).mask.tolist() == [[False, True], [False, True]]
    assert tokens.rows(torch.tensor([1])).ids.tolist() == [[2, 3]]
    assert tokens.repeat(2).ids.tolist() == 2 * [[0, 1], [2, 3], [0, 4]]
    assert tokens.repeat(2).mask.tolist() == 2 * [[False, True], [True, True], [False, True]]


id_pairs = st.lists(
    st.tuples(prompt_ids, prompt_ids, st.lists(st.integers(0, 49), min_size=1, max_size=3)).filter(
        lambda row: row[0] != row[1]
    ),
    min_size=1,
    max_size=7,
)


@given(id_pairs, st.integers(1, 8))
@settings(deadline=None)
def test_batches_cover_the_task_and_trim_both_sides_alike(
    rows: list[tuple[tuple[int, ...], tuple[int, ...], list[int]]], size: int
) -> None:
    """Batches hold every pair once and in order, and are as wide as their longest prompt."""
    pairs = [PromptPair(c, k, tuple(right), (50,)) for c, k, right in rows]
    encoded = encode(*pairs, tokenizer=None, align="pad")
    seen: list[int] = []
    for batch in encoded.batches(size):
        assert 1 <= len(batch) <= size
        part = [pairs[number - 1] for number in batch.numbers]
        width = max(max(len(pair.clean), len(pair.corrupt)) for pair in part)
        assert batch.clean.ids.shape == batch.corrupt.ids.shape == (len(part), width)
        for i, pair in enumerate(part):
            for tokens, prompt in ((batch.clean, pair.clean), (batch.corrupt, pair.corrupt)):
                assert tuple(tokens.ids[i][tokens.mask[i]].tolist()) == prompt
                assert tokens.mask[i, -1]
            right = {int(a) for a in batch.answers.right[i] if a >= 0}
            assert right == set(pair.answers)
            assert batch.tokens_text[i] == tuple(map(str, pair.clean))
        seen += batch.numbers
    assert seen == list(range(1, len(pairs) + 1))


def test_task_is_encoded_as_the_tokenizer_writes_it() -> None:
    """Prompts carry the automatic BOS, answers do not; tokens are shown as text."""
    encoded = encode(PAIR)
    assert encoded.clean.ids.tolist() == [[VOCAB["[BOS]"], *(VOCAB[w] for w in CLEAN.split())]]
    assert encoded.answers.right.tolist() == [[VOCAB["Mary"]]]
    assert encoded.answers.wrong.tolist() == [[VOCAB["John"]]]
    assert encoded.tokens_text == (("[BOS]", *CLEAN.split()),)
    assert (encoded.warnings, encoded.aligned) == ((), True)
    assert encoded.metric.name == "logit-difference"
    assert encode(byte_pair(" Mary"), tokenizer=BYTE).tokens_text == (("Then", " James", " met"),)


def test_answers_are_padded_and_count_once() -> None:
    """Pairs with fewer answers are padded with -1; a repeated answer is one answer."""
    other = PromptPair((3, 4, 6), (3, 6, 6), (7, 9, 7), (8,))
    encoded = encode(IDS, other, tokenizer=None)
    assert encoded.answers.right.tolist() == [[7, -1], [7, 9]]
    assert encoded.answers.wrong.tolist() == [[8], [8]]


def test_appended_eos_is_left_out() -> None:
    """A tokenizer that appends EOS does not put it between the prompt and its answer."""
    encoded = encode(PAIR, tokenizer=word_tokenizer("[BOS] $A [EOS]"))
    assert torch.equal(encoded.clean.ids, encode(PAIR).clean.ids)
    assert torch.equal(encoded.answers.right, encode(PAIR).answers.right)


def test_score_is_the_metric_of_each_pair() -> None:
    """Scores are right minus wrong logit; logits of another shape are refused."""
    other = PromptPair((3, 4, 6), (3, 6, 6), (7, 9), (8,))
    encoded = encode(IDS, other, tokenizer=None)
    logits = torch.arange(2000.0).reshape(2, 1000) ** 2
    expected = [logits[0, 7] - logits[0, 8], (logits[1, 7] + logits[1, 9]) / 2 - logits[1, 8]]
    assert encoded.score(logits, logits).tolist() == [float(e) for e in expected]
    with pytest.raises(SiteError, match=re.escape("give those after the last token, [2, vocab]")):
        encoded.score(logits[:, None], logits)
    with pytest.raises(SiteError, match="reference to score have shape"):
        encoded.score(logits, logits[:1])


def test_bad_options() -> None:
    """An unknown alignment, a batch of nothing, and no prompts at all are refused."""
    with pytest.raises(OptionError, match="align 'left' is unknown; use refuse, pad, drop"):
        encode(IDS, tokenizer=None, align="left")
    with pytest.raises(OptionError, match="batch size 0 is too small; use 1 or more"):
        encode(IDS, tokenizer=None).batches(0)
    with pytest.raises(TaskError, match="no prompts to encode; give at least one"):
        encode_prompts(None, [], vocab_size=9, n_positions=9)
    with pytest.raises(TaskError, match=r"metric 'x' does not exist; metrics are .*kl-divergence"):
        encode(IDS, tokenizer=None, metric="x")


def test_text_without_a_tokenizer() -> None:
    """Text for a model without a tokenizer is refused; ids, as the message says, are not."""
    assert refusal(IDS, PAIR, tokenizer=None) == (
        "task 't', pair 2: clean is text, but the model has no tokenizer; write it as token ids"
    )
    text_answer = PromptPair((3, 4), (3, 5), (" Mary",), (6,))
    assert "pair 1: answer is text" in refusal(text_answer, tokenizer=None)
    assert encode(IDS, tokenizer=None).tokens_text == (("3", "4", "5"),)
    with pytest.raises(TaskError, match="prompt 2 is text"):
        encode_prompts(None, [(1,), "a"], vocab_size=9, n_positions=9)


def test_unknown_words_are_named() -> None:
    """Words that become the unknown token are named, with the tokens; written out it is fine."""
    message = refusal(PAIR, PromptPair("Bob gave Sue it", "John gave a it", ("Mary",), ("John",)))
    assert message.startswith("task 't', pair 2: clean holds words the tokenizer does not know: ")
    assert '"Bob", "Sue"' in message
    assert "[[BOS]|[UNK]|gave|[UNK]|it]" in message
    assert "\\u{1b}" in refusal(PromptPair("Mary \x1b[31m\u202e", "Mary gave", ("it",), ("to",)))
    literal = PromptPair("[UNK] gave it", "John gave it", ("Mary",), ("John",))
    assert encode(literal).clean.ids[0, 1] == VOCAB["[UNK]"]
    end = PromptPair(f"{END}James met", f"{END}John met", (" Mary",), (" Jill",))
    assert encode(end, tokenizer=BYTE, align="pad").tokens_text[0][0] == END
    both = word_tokenizer("[UNK] $A", "[UNK]")
    assert encode(PAIR, tokenizer=both).clean.ids[0, 0] == VOCAB["[UNK]"]


def test_ids_outside_the_vocabulary() -> None:
    """An id the model does not have is refused, in prompts and answers, tokenizer or not."""
    message = refusal(IDS, PromptPair((3, 1000), (3, 4), (5,), (6,)), tokenizer=None)
    assert message.startswith("task 't', pair 2: clean holds token id 1000, the model's vocabulary")
    assert "pair 1: wrong answer holds token id 12" in refusal(
        PromptPair((3, 4), (3, 5), (5,), (12,)), tokenizer=None, vocab_size=12
    )
    assert "clean holds token id 9" in refusal(PAIR, vocab_size=9)
    last = VOCAB["it"]
    words = PromptPair("Mary", "John", ("it",), ("to",))
    assert f"pair 1: answer holds token id {last}" in refusal(words, vocab_size=last)
    assert encode(words, vocab_size=last + 1).answers.right.tolist() == [[last]]


def test_prompt_longer_than_the_context() -> None:
    """Row 16: the pair, both lengths and the tokens are named; at the limit it is accepted."""
    long = PromptPair((1, 2, 3, 4), (1, 2, 3, 5), (5,), (6,))
    message = refusal(IDS, long, tokenizer=None, n_positions=3)
    assert message.startswith(
        "task 't', pair 2: clean has 4 tokens, the model reads at most 3; shorten it or leave the "
    )
    assert "[1|2|3|4]" in message
    assert len(encode(IDS, tokenizer=None, n_positions=3)) == 1


UNEVEN = PromptPair("When Mary and", "When Mary", ("John",), ("it",))


def test_uneven_pairs_are_refused_by_default() -> None:
    """Row 12: the rows and their tokens are named, and both ways out."""
    message = refusal(PAIR, UNEVEN)
    assert message == (
        "task 't', pair 2: clean and corrupt differ in length (pair 2: clean has 4 tokens "
        "[[BOS]|When|Mary|and], corrupt 3 [[BOS]|When|Mary]); use --align drop to leave such "
        "pairs out, or --align pad to pad the shorter on the left"
    )
    assert "pairs 1, 2, 3, 4, 5 and 1 more:" in refusal(*[UNEVEN] * 6)


def test_uneven_pairs_can_be_dropped() -> None:
    """``--align drop`` leaves them out with a warning; the others keep their numbers."""
    encoded = encode(UNEVEN, PAIR, align="drop")
    assert encoded.numbers == (2,)
    assert encoded.warnings == ("task 't', pair 1: left out, clean and corrupt differ in length",)
    assert torch.equal(encoded.clean.ids, encode(PAIR).clean.ids)
    assert encoded.aligned
    assert "in every pair, none is left; use --align pad" in refusal(UNEVEN, align="drop")


def test_uneven_pairs_can_be_padded() -> None:
    """``--align pad`` pads the shorter on the left, warns, and says that positions differ."""
    encoded = encode(UNEVEN, align="pad")
    assert encoded.corrupt.mask.tolist() == [[False, True, True, True]]
    assert encoded.corrupt.position_ids.tolist() == [[0, 0, 1, 2]]
    assert encoded.clean.mask.all()
    assert not encoded.aligned
    assert "pair 1: the shorter prompt is padded on the left" in encoded.warnings[0]


def test_equal_prompts_are_refused() -> None:
    """Row 10: pairs whose prompts are the same tokens are named, even when the text differs."""
    same = PromptPair("Mary  gave", "Mary gave", ("John",), ("it",))
    message = refusal(PAIR, same)
    assert message.startswith("task 't', pair 2: the metric gap is 0, clean and corrupt are the sa")
    assert "[[BOS]|Mary|gave]" in message


def test_prompts_without_tokens_are_refused() -> None:
    """Text of which only the tokenizer's own BOS is left is no prompt; nor is no id."""
    blank = PromptPair("  ", "Mary", ("it",), ("to",))
    assert 'pair 1: clean "  " holds no token' in refusal(blank)
    for prompt, message in (("", "prompt 1 .* holds no token"), ((), "prompt 1 is empty")):
        with pytest.raises(TaskError, match=message):
            encode_prompts(WORD, [prompt], vocab_size=99, n_positions=9)


def test_answer_of_several_tokens_and_its_remedy() -> None:
    """Row 13: the tokens are shown, the form with a space is suggested, and that form works."""
    message = refusal(byte_pair("John"), tokenizer=BYTE)
    ids = BYTE("John")["input_ids"]
    shown, count = "|".join(BYTE.convert_ids_to_tokens(ids)), len(ids)
    assert count > 1
    assert message == (
        f"task 't', pair 1: answer \"John\" is {count} tokens [{shown}], not one; "
        'write " John", which is one token'
    )
    assert encode(byte_pair(" John"), tokenizer=BYTE).warnings == ()
    assert 'wrong answer "John" is' in refusal(byte_pair(" Mary", "John"), tokenizer=BYTE)
    assert "choose an answer that is one token" in refusal(byte_pair(" xyzzy"), tokenizer=BYTE)


def test_answer_outside_the_vocabulary() -> None:
    """Row 13: an answer the tokenizer does not know is refused with its tokens."""
    message = refusal(PromptPair(CLEAN, CORRUPT, ("Bob",), ("John",)))
    assert 'pair 1: answer "Bob" is not in the vocabulary: its tokens are [[UNK]];' in message


def test_answer_without_its_space_is_warned_of() -> None:
    """Row 13: one token with and another without a space is a warning that shows both."""
    encoded = encode(byte_pair("Mary"), byte_pair(" Mary", end=" saw"), tokenizer=BYTE)
    assert len(encoded.warnings) == 1
    assert encoded.warnings[0].startswith("task 't', pair 1: an answer begins without a space")
    assert '("Mary" and " Mary" are different tokens)' in encoded.warnings[0]
    assert encode(byte_pair(","), tokenizer=BYTE).warnings == ()
    after_space = encode(byte_pair("Mary", end=" met "), tokenizer=BYTE).warnings
    assert all("ends in a space" in warning for warning in after_space)


def test_answer_that_is_also_wrong() -> None:
    """A token cannot be right and wrong in one pair, even when it is written in two ways."""
    both = PromptPair((3, 4), (3, 5), (4, 6), (6,))
    assert 'pair 1: token "6" is both an answer and a wrong' in refusal(both, tokenizer=None)
    spaced = PromptPair(CLEAN, CORRUPT, ("Mary",), (" Mary",))
    assert 'token "Mary" is both' in refusal(spaced)


def test_metric_that_needs_a_wrong_answer() -> None:
    """A pair without a wrong answer is refused for such a metric, and the remedy works."""
    pair = PromptPair(CLEAN, CORRUPT, ("Mary",))
    message = refusal(PAIR, pair)
    assert message == (
        "task 't', pair 2: metric 'logit-difference' needs a wrong answer and there is none; "
        "name one, or use --metric answer-log-prob"
    )
    encoded = encode(PAIR, pair, metric="answer-log-prob")
    assert encoded.answers.wrong.tolist() == [[VOCAB["John"]], [-1]]
    assert encode(pair, metric="answer-log-prob").answers.wrong.shape == (1, 0)


def test_repeated_pairs_are_counted() -> None:
    """Row 15: pairs that repeat an earlier one are counted and named in one warning."""
    other = PromptPair((3, 4, 6), (3, 6, 6), (7,), (8,))
    encoded = encode(IDS, other, IDS, IDS, tokenizer=None)
    assert len(encoded.warnings) == 1
    assert encoded.warnings[0].startswith("task 't', pairs 3, 4: 2 of 4 pairs repeat an earlier")
    assert encode(IDS, other, tokenizer=None).warnings == ()


def test_bos_twice_or_missing() -> None:
    """Row 17: both are warned of where the tokenizer adds BOS by itself, and only there."""
    bos = VOCAB["[BOS]"]
    twice = encode(PromptPair("[BOS] Mary gave", "[BOS] John gave", ("it",), ("to",)))
    assert len(twice.warnings) == 2
    assert "pair 1: corrupt begins with BOS '[BOS]' twice" in twice.warnings[1]
    missing = encode(PromptPair((4, 10), (bos, 6), (7,), (8,)))
    assert len(missing.warnings) == 1
    assert "pair 1: clean does not begin with BOS '[BOS]'" in missing.warnings[0]
    assert encode(PromptPair((bos, 4), (bos, 6), (7,), (8,))).warnings == ()
    assert encode(IDS, tokenizer=BYTE).warnings == ()
    assert encode(byte_pair(" Mary"), tokenizer=BYTE).warnings == ()


def test_prompt_that_ends_in_a_space() -> None:
    """A last space that is a token is warned of; where the tokenizer ignores it, it is not."""
    encoded = encode(byte_pair(" Mary", end=" met "), tokenizer=BYTE)
    assert len(encoded.warnings) == 2
    assert "pair 1: clean ends in a space, which becomes a token of its own" in encoded.warnings[0]
    assert encode(PromptPair("Mary gave ", "John gave ", ("it",), ("to",))).warnings == ()


def test_ids_are_used_as_they_are() -> None:
    """With a tokenizer, ids are not touched; one it has no text for is shown by its number."""
    encoded = encode(PromptPair((1, 999), (1, 4), (7,), (8,)))
    assert (encoded.clean.ids.tolist(), encoded.tokens_text) == ([[1, 999]], (("[BOS]", "#999"),))
