"""The bank of pairs: of each kind, distinct, frozen by a seed, and refused where it is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from circuitlab_activation_plateaus.walks.pairs import KINDS, Bank, make_bank

from circuitlab import (
    OptionError,
    PromptPair,
    Task,
    TaskError,
    Tokens,
    TracedModel,
    load_model,
    zoo,
)
from circuitlab.testing import tiny_model, toy_task


def prompts(tokens: Tokens) -> list[tuple[int, ...]]:
    """Each prompt without its padding."""
    return [tuple(i for i, m in zip(*row, strict=True) if m) for row in _lists(tokens)]


def _lists(tokens: Tokens) -> list[tuple[list[int], list[bool]]]:
    return list(zip(tokens.ids.tolist(), tokens.mask.tolist(), strict=True))


def pairs_of(bank: Bank) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The pairs as token ids."""
    return list(zip(prompts(bank.a), prompts(bank.b), strict=True))


@pytest.fixture(scope="module")
def induction() -> TracedModel:
    """The bundled model."""
    return load_model("induction")


def test_last_token(induction: TracedModel) -> None:
    """B is A but for its last token, which A holds: the model knows what follows it."""
    bank = make_bank(induction, None, "last-token", 40, 3)
    assert len(bank) == 40
    assert bank.same_prefix
    assert bank.kind == "last-token"
    for (a, b), names in zip(pairs_of(bank), bank.labels, strict=True):
        assert a[:-1] == b[:-1]
        assert a[-1] != b[-1]
        assert b[-1] in a
        assert list(names) == induction.token_texts([a[-1], b[-1]])
    assert len(set(pairs_of(bank))) == 40


def test_last_token_without_texts() -> None:
    """From a task of few prompts each is used with several last tokens, no pair twice."""
    model, task = tiny_model(), toy_task()
    own = {tuple(pair.clean) for pair in task.pairs}
    ends = {prompt[-1] for prompt in own}
    bank = make_bank(model, task, "last-token", 12, 0)
    assert {a for a, _ in pairs_of(bank)} == own
    assert all(b[-1] in ends - {a[-1]} for a, b in pairs_of(bank))
    assert len(set(pairs_of(bank))) == len(bank)
    assert len({tuple(pair) for pair in make_bank(model, task, "last-token", 5).labels}) == 5


def test_one_last_token() -> None:
    """Where all prompts end alike, the other last token is one that the prompt holds."""
    bank = make_bank(load_model("ioi-mini"), None, "last-token", 40, 0)
    assert len({a[-1] for a, _ in pairs_of(bank)}) == 1
    assert len({a[0] for a, _ in pairs_of(bank)}) == 1, "the BOS token"
    assert all(b[-1] in a[1:-1] and b[-1] != a[-1] for a, b in pairs_of(bank))


def test_task() -> None:
    """A and B are the distinct clean and corrupt prompts, with the padding of each pair alike."""
    model, task = tiny_model(), toy_task()
    twice = Task("twice", (*task.pairs, task.pairs[0]))
    bank = make_bank(model, twice, "task", 64, 0)
    assert pairs_of(bank) == [(tuple(p.clean), tuple(p.corrupt)) for p in task.pairs]
    assert not bank.same_prefix
    assert bool((bank.a.mask == bank.b.mask).all())
    assert len(make_bank(model, task, "task", 2)) == 2


def test_unrelated() -> None:
    """Pairs have one length; a prompt is in one pair only, and texts are the model's own."""
    model = load_model("hand-duplicate")
    bank = make_bank(model, None, "unrelated", 20, 0)
    assert len(bank) == 20
    assert all(len(a) == len(b) and a != b for a, b in pairs_of(bank))
    assert len({prompt for pair in pairs_of(bank) for prompt in pair}) == 40


def test_unrelated_of_few() -> None:
    """Few prompts give every pair of one length, none twice, and those without reuse come first."""
    prompts_ = [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12), (13, 14)]
    task = Task("few", tuple(PromptPair(p, (*p[:-1], 20), (1,), (2,)) for p in prompts_))
    bank = make_bank(tiny_model(), task, "unrelated", 64, 1)
    found = [frozenset(pair) for pair in pairs_of(bank)]
    assert len(found) == len(set(found)) == 6
    assert len(found[0] | found[1]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_frozen(induction: TracedModel, kind: str) -> None:
    """The same seed gives the same bank; another seed gives another, where prompts are drawn."""
    task = next(task for task in zoo.tasks() if task.name == "induction")
    first, again, other = (make_bank(induction, task, kind, 8, seed) for seed in (0, 0, 1))
    assert pairs_of(first) == pairs_of(again)
    assert first.labels == again.labels
    assert (pairs_of(first) == pairs_of(other)) == (kind == "task")


def test_rows_and_swapped() -> None:
    """Chosen pairs keep their order; a swapped bank exchanges prompts and names."""
    bank = make_bank(tiny_model(), toy_task(), "task", 64, 0)
    assert pairs_of(bank.rows([3, 1])) == [pairs_of(bank)[3], pairs_of(bank)[1]]
    assert bank.rows(slice(2, None)).labels == bank.labels[2:]
    assert pairs_of(bank.swapped) == [(b, a) for a, b in pairs_of(bank)]
    assert bank.swapped.labels == [(b, a) for a, b in bank.labels]


def test_file(induction: TracedModel, tmp_path: Path) -> None:
    """A file's pairs are read as texts or as ids, and those that repeat one are left out."""
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"a": "ant bed cat", "b": "ant bed dog"},
        {"a": [3, 4], "b": [3, 5]},
        {"b": [3, 5], "a": [3, 4]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    bank = make_bank(induction, None, str(file))
    assert bank.kind == "pairs.jsonl"
    assert bank.same_prefix
    assert bank.labels[0] == ("cat", "dog")
    text = induction.tokens(["ant bed cat"]).ids[0].tolist()
    assert pairs_of(bank)[0][0] == tuple(text)
    assert pairs_of(bank)[1:] == [((3, 4), (3, 5))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "no pair"),
        ('{"a": "ant"}', "no pair"),
        ('{"a": "ant", "b": 3}', "b is no prompt"),
        ('{"a": "ant", "b": [true]}', "b is no prompt"),
        ('{"a": "ant", "b": "ant bed"}', "a has 2 tokens, b 3"),
        ('{"a": "ant", "b": "ant"}', "the same tokens"),
        ('{"a": "ant", "b": "zebra-crossing"}', "pairs.jsonl:2, b"),
        ('{"a": "ant", "b": [9999]}', "pairs.jsonl:2, b"),
    ],
)
def test_bad_file(induction: TracedModel, tmp_path: Path, line: str, said: str) -> None:
    """What is no pair is refused by file, line and fact."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"a": "ant bed", "b": "ant cat"}\n' + line + "\n")
    with pytest.raises(TaskError) as caught:
        make_bank(induction, None, str(file))
    assert said in str(caught.value)
    assert "pairs.jsonl:2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused(tmp_path: Path) -> None:
    """No prompts, no pairs, no such kind: each refused with a remedy."""
    model = tiny_model()
    for pairs, remedy in (("last-token", "--task"), ("task", "--task"), ("nearest", ".jsonl")):
        with pytest.raises(OptionError, match=remedy):
            make_bank(model, None, pairs)
    with pytest.raises(OptionError, match="1 or more"):
        make_bank(model, toy_task(), "task", 0)
    (tmp_path / "empty.jsonl").write_text("\n")
    for file in ("empty.jsonl", "missing.jsonl"):
        with pytest.raises(TaskError, match=file):
            make_bank(model, None, str(tmp_path / file))
    single = Task("single", (PromptPair((4,), (5,), (1,), (2,)),))
    for pairs in ("last-token", "unrelated"):
        with pytest.raises(TaskError, match=r"FILE\.jsonl"):
            make_bank(model, single, pairs)
    uneven = Task("uneven", (PromptPair((4, 5), (5,), (1,), (2,)),), align="pad")
    with pytest.raises(TaskError, match="--align drop"):
        make_bank(model, uneven, "task")
