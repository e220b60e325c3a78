"""Tokenizers of the bundled models: one token per word, and one ``<bos>`` in front."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from circuitlab.zoo.recipe import BOS, PAD, TOKEN_PATTERN, UNK


def word_tokenizer(vocabulary: Sequence[str], n_positions: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the places of the words in ``vocabulary``.

    Any other word becomes ``<unk>``; padding goes to the left.
    """
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = Split(Regex(TOKEN_PATTERN), behavior="removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped upstream
        tokenizer_object=tokenizer,
        bos_token=BOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        truncation_side="left",
        model_max_length=n_positions,
        clean_up_tokenization_spaces=True,
    )
