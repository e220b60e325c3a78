"""The bundled models do what they are shipped for, and the hand-made ones are as described."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from circuitlab import load_model, zoo
from circuitlab.errors import ModelError, ResourceError
from circuitlab.tasks import Task
from circuitlab.zoo import docstring_mini, greater_than, induction, ioi_mini, training
from circuitlab.zoo.recipe import split

RECIPE_MODULES = [induction, ioi_mini, greater_than, docstring_mini]
TRAINED = [name for name, model in zoo.MODELS.items() if model.kind == "trained"]


def task_of(name: str) -> Task:
    return next(task for task in zoo.tasks() if task.name == name)


# --- The face


def test_listing_models_and_tasks_is_light() -> None:
    """Listing the zoo imports neither torch nor transformers."""
    code = (
        "import sys; from circuitlab import zoo; zoo.tasks(); zoo.MODELS; "
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_model_has_a_task_of_its_name() -> None:
    """Model and task are called alike, and there are no other tasks."""
    assert [task.name for task in zoo.tasks()] == list(zoo.MODELS)
    assert all(model.task == name == model.name for name, model in zoo.MODELS.items())


def test_tasks_do_not_depend_on_the_process() -> None:
    """Two processes with different string hashing make the same tasks."""
    code = "from circuitlab import zoo; print([(t.name, t.pairs) for t in zoo.tasks()])"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


@pytest.mark.parametrize("call", [zoo.load, zoo.train, zoo.folder, zoo.known_edges])
def test_unknown_name_suggests_the_nearest(call: Callable[[str], object]) -> None:
    """A misspelt model is refused, and the error offers the name that was meant."""
    with pytest.raises(ModelError, match="did you mean 'induction'"):
        call("inducton")


def test_hand_models_cannot_be_trained_or_saved(tmp_path: Path) -> None:
    """A compiled model has no recipe, no folder, and no stock layout."""
    with pytest.raises(ModelError, match="compiled, not trained"):
        zoo.train("gate-and")
    with pytest.raises(ModelError, match="has no folder"):
        zoo.folder("gate-and")
    with pytest.raises(ModelError, match="no norms"):
        zoo.save(*zoo.load("gate-and"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_known_edges_of_a_trained_model_are_refused() -> None:
    """Nobody knows the true circuit of trained weights."""
    with pytest.raises(ModelError, match="was trained"):
        zoo.known_edges("induction")


@pytest.mark.parametrize("name", ["induction", "hand-induction"])
def test_load_leaves_the_random_state_alone(name: str) -> None:
    """Loading a model does not change what torch draws next."""
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    zoo.load(name)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_loaded_model_is_frozen_and_eager(name: str) -> None:
    """Models come in eval mode, in float32, untied, with attention that shows its probabilities."""
    module, _ = zoo.load(name)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert module.config._attn_implementation == "eager"
    assert module.lm_head.weight.data_ptr() != module.transformer.wte.weight.data_ptr()
    model = zoo.MODELS[name]
    config = module.config
    assert f"{config.n_layer} layer" in model.shape
    heads = "1 head" if config.n_head == 1 else f"{config.n_head} heads"
    assert f"{heads}, d_model {config.n_embd}" in model.shape


# --- Tokenizers and tasks


@pytest.mark.parametrize("task", zoo.tasks(), ids=lambda task: task.name)
def test_pairs_tokenize_evenly(task: Task) -> None:
    """Within a pair lengths agree, no word is unknown, and each answer is one token."""
    module, tokenizer = zoo.load(task.name)
    for pair in task.pairs:
        clean, corrupt = (tokenizer(text)["input_ids"] for text in (pair.clean, pair.corrupt))
        assert len(clean) == len(corrupt) <= module.config.n_positions
        assert clean != corrupt
        for ids in (clean, corrupt):
            assert ids.count(tokenizer.bos_token_id) == 1
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
        for answer in (*pair.answers, *pair.wrong_answers):
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert ids == tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
            assert len(ids) == 1
            assert ids[0] != tokenizer.unk_token_id
        assert not set(pair.answers) & set(pair.wrong_answers)
        assert pair.wrong_answers


@pytest.mark.parametrize("name", TRAINED)
def test_trained_tasks_have_64_different_prompts(name: str) -> None:
    """A task does not count one prompt twice."""
    assert len({pair.clean for pair in task_of(name).pairs}) == len(task_of(name).pairs) == 64


def test_tokenizer_reads_and_writes_plain_text() -> None:
    """Punctuation, unknown words, padding side and decoding are as a user expects."""
    _, tokenizer = zoo.load("ioi-mini")
    text = "When Mary and John went to the store, Mary gave a drink to"
    batch = tokenizer([text, "Mary gave"], padding=True)
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["<bos>", *split(text)]
    assert batch["attention_mask"][1] == [0] * 12 + [1] * 3
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == text
    unknown = tokenizer("Mary met John")["input_ids"]
    assert [i == tokenizer.unk_token_id for i in unknown] == [False, False, True, False]


def test_years_are_single_tokens() -> None:
    """A year splits into century and two digits, so "32" can be compared and replaced."""
    _, tokenizer = zoo.load("greater-than")
    assert tokenizer.tokenize("from the year 1732 to") == ["from", "the", "year", "17", "32", "to"]


def test_ioi_task_is_stratified_and_swaps_the_answer() -> None:
    """Templates and name orders are even; corrupting makes the other person the answer."""
    orders: dict[tuple[str, bool], int] = {}
    for pair in task_of("ioi-mini").pairs:
        words, other = split(pair.clean), split(pair.corrupt)
        (io,), (subject,) = pair.answers, pair.wrong_answers
        changed = [(a, b) for a, b in zip(words, other, strict=True) if a != b]
        assert changed == [(subject, io)]
        assert (words.count(io), words.count(subject)) == (1, 2)
        key = (words[0], words.index(io) < words.index(subject))
        orders[key] = orders.get(key, 0) + 1
    assert sorted(orders.values()) == [8] * 8


def test_induction_corruption_is_one_word() -> None:
    """Only the first occurrence of the query changes, to a word not in the clean prompt."""
    for name in ("induction", "hand-induction"):
        for pair in task_of(name).pairs:
            words, other = split(pair.clean), split(pair.corrupt)
            (change,) = [i for i, (a, b) in enumerate(zip(words, other, strict=True)) if a != b]
            assert words[change] == words[-1]
            assert words.count(words[-1]) == 2
            assert other[change] not in words
            assert (words[change + 1],) == pair.answers
            assert pair.wrong_answers[0] in words


def test_docstring_corruption_changes_only_the_definition() -> None:
    """The corrupt function shares no argument with the clean one; what is documented stays."""
    for pair in task_of("docstring-mini").pairs:
        heads, tails = zip(*(text.split(")") for text in (pair.clean, pair.corrupt)), strict=True)
        clean, corrupt = (set(split(head.split("(")[1])) - {","} for head in heads)
        assert tails[0] == tails[1]
        assert not clean & corrupt
        assert {*pair.answers, *pair.wrong_answers} <= clean


def test_greater_than_answers_are_the_later_years() -> None:
    """Right are the years after the start, wrong all others; the corrupt start is 01."""
    for pair in task_of("greater-than").pairs:
        start = split(pair.clean)[7]
        assert split(pair.corrupt)[7] == "01"
        assert all(answer > start for answer in pair.answers)
        assert all(answer <= start for answer in pair.wrong_answers)
        assert len(pair.answers) + len(pair.wrong_answers) == 100


# --- Trained models

THRESHOLDS = {
    "induction": {"accuracy": 0.98, "previous-token": 0.8, "induction": 0.7},
    "ioi-mini": {"accuracy": 0.95},
    "greater-than": {"probability-difference": 0.95},
    "docstring-mini": {"accuracy": 0.97},
    "and-superposition": {
        "accuracy": 0.95,
        "recall": 0.85,
        "precision": 0.85,
        "interaction": 0.7,
    },
}


@pytest.mark.parametrize("name", TRAINED)
def test_shipped_model_meets_its_thresholds(name: str) -> None:
    """Measured now, on held-out prompts, the shipped weights are as good as promised."""
    metrics = zoo.evaluate(name, *zoo.load(name))
    assert {
        key: metrics[key] for key, least in THRESHOLDS[name].items() if metrics[key] < least
    } == {}
    assert metrics["clean-logit-difference"] > 3
    assert metrics["clean-logit-difference"] - metrics["corrupt-logit-difference"] > 3


def last_logits(module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return module(**tokenizer(text, return_tensors="pt")).logits[0, -1]


@pytest.mark.parametrize("name", TRAINED)
def test_shipped_model_does_every_task_pair_apart(name: str) -> None:
    """One prompt at a time, without padding, at least 61 of 64 answers are right."""
    module, tokenizer = zoo.load(name)
    right = sum(
        tokenizer.decode(last_logits(module, tokenizer, pair.clean).argmax()) in pair.answers
        for pair in task_of(name).pairs
    )
    assert right >= 61


@pytest.mark.parametrize("name", TRAINED)
def test_stock_loading_gives_the_same_model(name: str) -> None:
    """transformers alone reads the folder: same logits and ids, no weight missing or left over."""
    module, tokenizer = zoo.load(name)
    stock, report = GPT2LMHeadModel.from_pretrained(zoo.folder(name), output_loading_info=True)
    assert not any(report.values())
    other = AutoTokenizer.from_pretrained(zoo.folder(name))
    text = task_of(name).pairs[0].clean
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert other(text)["input_ids"] == ids[0].tolist()
    assert other.padding_side == tokenizer.padding_side == "left"
    # Stock attention is a fused kernel; it sums the same 32 products in another order.
    assert torch.allclose(stock.eval()(ids).logits, module(ids).logits, atol=1e-4, rtol=0)
    stock.set_attn_implementation("eager")
    assert torch.equal(stock(ids).logits, module(ids).logits)


@pytest.mark.parametrize("module", RECIPE_MODULES)
def test_shipped_vocabulary_is_the_recipe_s(module: ModuleType) -> None:
    """The shipped tokenizer has the recipe's words at the recipe's ids."""
    recipe = module.RECIPE
    _, tokenizer = zoo.load(recipe.name)
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(recipe.vocabulary)}


@pytest.mark.parametrize("name", TRAINED)
def test_folder_is_small_and_ordinary(name: str) -> None:
    """Each model takes less than 1 MB, in the four files of the layout."""
    files = {path.name: path.stat().st_size for path in zoo.folder(name).iterdir()}
    assert set(files) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 1_000_000


def test_docstring_mini_is_attention_only() -> None:
    """Its MLPs write exactly nothing."""
    module, _ = zoo.load("docstring-mini")
    for block in module.transformer.h:
        assert not block.mlp(torch.randn(1, 3, 64)).any()


@pytest.mark.parametrize("module", RECIPE_MODULES)
def test_recipe_is_deterministic_and_learns(module: ModuleType) -> None:
    """The same seed gives the same weights, another seed others, and the loss falls."""
    losses: list[float] = []

    def report(step: int, total: int, metrics: Mapping[str, float]) -> None:
        assert 0 < step <= total == 40
        losses.append(metrics["loss"])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = training.train(module.RECIPE, steps=40, progress=report)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = training.train(module.RECIPE, steps=40)
    for (key, weight), (_, other) in zip(
        first.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(weight, other), key
    different = training.train(module.RECIPE, seed=1, steps=1)
    assert not torch.equal(different.lm_head.weight, first.lm_head.weight)
    assert len(losses) == 2
    assert losses[0] > losses[1]


def test_recipe_reaches_its_threshold() -> None:
    """A quarter of the steps makes the quickest model as good as the shipped one must be."""
    _, _, metrics = zoo.train("docstring-mini", steps=150)
    assert metrics["accuracy"] >= THRESHOLDS["docstring-mini"]["accuracy"]


def test_saved_model_comes_back(tmp_path: Path) -> None:
    """What save writes has the shipped layout, and stock transformers reads it."""
    module, tokenizer = zoo.load("docstring-mini")
    zoo.save(module, tokenizer, tmp_path / "new" / "folder")
    written = tmp_path / "new" / "folder"
    assert {p.name for p in written.iterdir()} == {
        p.name for p in zoo.folder("docstring-mini").iterdir()
    }
    stock = GPT2LMHeadModel.from_pretrained(written)
    for key, weight in module.state_dict().items():
        assert torch.equal(stock.state_dict()[key], weight), key


def test_save_into_a_file_is_refused(tmp_path: Path) -> None:
    """A folder that cannot be is named in the error."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(ResourceError, match="taken"):
        zoo.save(*zoo.load("docstring-mini"), tmp_path / "taken")


def test_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated weights file gives a ModelError that says which folder."""
    target = tmp_path / "docstring-mini"
    zoo.save(*zoo.load("docstring-mini"), target)
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setattr(zoo, "_WEIGHTS", tmp_path)
    with pytest.raises(ModelError, match=r"docstring-mini.*reinstall"):
        zoo.load("docstring-mini")
    with pytest.raises(ModelError, match="induction"):
        zoo.load("induction")


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of difference from what was shipped is found, though the file can be read."""
    sums = (zoo.folder("docstring-mini").parent / "SHA256SUMS").read_text()
    target = tmp_path / "docstring-mini"
    zoo.save(*zoo.load("docstring-mini"), target)
    (tmp_path / "SHA256SUMS").write_text(sums)
    monkeypatch.setattr(zoo, "_WEIGHTS", tmp_path)
    shipped = zoo.digest("docstring-mini")
    assert shipped is not None
    assert shipped in sums
    assert load_model("docstring-mini").revision == shipped
    weights = target / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ModelError, match=r"'docstring-mini' are not those .* reinstall"):
        zoo.load("docstring-mini")
