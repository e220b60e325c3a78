"""Summing: models whose head adds up what words stand for, for one layer of ReLUs.

The head's query is constant and its only key is that of ``<bos>``, so a word gets 1 / (SINK + n) of
its attention, and its values are SINK times what the words stand for. Row-vector convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from circuitlab.zoo import superposition as layout
from circuitlab.zoo.hand import NO, YES
from circuitlab.zoo.network import finished, gpt2, parameters, silent
from circuitlab.zoo.recipe import BOS, SPECIAL_WORDS
from circuitlab.zoo.superposition import GatesRecipe, Interference, Pair
from circuitlab.zoo.training import (
    REPORT_EVERY,
    Keep,
    Progress,
    last_logits,
    rate_share,
    repeatable,
)

#: Logit of what is there.
GAIN = 10.0
#: Size of the norms' divisor in models with norms: a constant in the stream, beside which the rest
#: changes it by less than one part in ten thousand.
SCALE = 256.0
#: Weight of ``<bos>`` in models with norms, whose rounding at ``<bos>`` the values multiply by it.
NORMED_SINK = 2.0**16

_BLOCK = "transformer.h.0"


@dataclass(frozen=True, eq=False)
class Gates:
    """An MLP that is to give the ANDs of pairs.

    Attributes:
        w_in: ``[inputs, neurons]``.
        b_in: ``[neurons]``.
        w_out: ``[neurons, written]``.
        b_out: ``[written]``.
        read: ``[written, pairs]``: how the unembedding reads a pair's value, without the gain.
    """

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    read: Tensor

    def values(self, bits: Tensor) -> Tensor:
        """Value of each pair, ``[n, pairs]``, from inputs that are 0 or 1, ``[n, inputs]``."""
        return ((bits @ self.w_in + self.b_in).relu() @ self.w_out + self.b_out) @ self.read


def compile_sum(name: str) -> GPT2LMHeadModel:
    """The hand-made model of superposition with this name."""
    if name == "hand-and":
        return compile_gates(name, closed_form())
    if name == "hand-planted":
        return _planted()
    return compile_interference(layout.INTERFERENCE)


def closed_form() -> Gates:
    """The MLP of hand-and: one ReLU for each half of the inputs, and one for all of them."""
    halves, pairs = layout.HALVES, layout.ALL_PAIRS
    w_in = torch.tensor(
        [[float(point in half) for half in halves] + [1.0] for point in range(layout.N_INPUTS)]
    )
    n = len(halves) + 1
    read = torch.tensor(
        [[float({*pair} <= half) for pair in pairs] for half in halves]
        + [[-float(layout.CROSSTALK)] * len(pairs)]
    )
    b_in = torch.tensor([-1.0] * len(halves) + [-2.0])
    return Gates(w_in, b_in, torch.eye(n), torch.zeros(n), read / layout.SHARED)


def compile_gates(name: str, gates: Gates, sink: float = layout.SINK) -> GPT2LMHeadModel:
    """A model that sums up its inputs, and gives them to an MLP; words first in the stream."""
    n_in, n_written = layout.N_INPUTS, gates.w_out.shape[1]
    width, vocabulary = 2 * n_in + 1 + n_written, layout.VOCABULARIES[name]
    module = _summing(len(vocabulary), width, n_inner=gates.w_in.shape[1], start=n_in, sink=sink)
    weights, words = (
        parameters(module),
        slice(len(SPECIAL_WORDS), len(SPECIAL_WORDS) + n_in),
    )
    sums, written = slice(n_in + 1, 2 * n_in + 1), slice(2 * n_in + 1, width)
    weights["transformer.wte.weight"][words, :n_in] = torch.eye(n_in)
    _add_up(weights, slice(0, n_in), sums, torch.eye(n_in), sink)
    weights[f"{_BLOCK}.mlp.c_fc.weight"][sums] = gates.w_in
    weights[f"{_BLOCK}.mlp.c_fc.bias"][:] = gates.b_in
    weights[f"{_BLOCK}.mlp.c_proj.weight"][:, written] = gates.w_out
    weights[f"{_BLOCK}.mlp.c_proj.bias"][written] = gates.b_out
    weights["lm_head.weight"][words.stop :, written] = GAIN * gates.read.T
    return module


def compile_interference(setting: Interference) -> GPT2LMHeadModel:
    """The model that says A and holds A xor B by interference, of any size.

    In the stream: the space of u, v and w; the bits A and B without noise, which the MLP reads and
    takes away again; a coordinate for each word; and that of ``<bos>``.
    """
    words = layout.VOCABULARIES["hand-interference"]
    u, v, w, _ = torch.tensor(layout.hadamard(layout.N_DIRECTIONS))
    meanings = {layout.A: u, layout.B: v}
    for (plus, minus), direction in zip(layout.NOISE, (u, v, w), strict=True):
        meanings |= {plus: setting.noise * direction, minus: -setting.noise * direction}
    n, shown = layout.N_DIRECTIONS, len(meanings) + 1
    space, bits, own = slice(0, n), slice(n, n + 2), slice(n + 2, n + 2 + shown)
    module = _summing(len(words), own.stop + 1, n_inner=3, start=own.stop)
    weights = parameters(module)
    ids = [words.index(word) for word in (*meanings, layout.END)]
    weights["transformer.wte.weight"][ids, own] = torch.eye(shown)
    stands_for = torch.zeros(shown, n + 2)
    stands_for[:-1, space] = torch.stack([*meanings.values()])
    stands_for[:2, bits] = torch.eye(2)
    _add_up(weights, own, slice(0, n + 2), stands_for)
    # The neurons are A and B, A, and B.
    mlp = f"{_BLOCK}.mlp"
    weights[f"{mlp}.c_fc.weight"][bits] = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    weights[f"{mlp}.c_fc.bias"][0] = -1.0
    weights[f"{mlp}.c_proj.weight"][:2, space] = setting.epsilon * torch.stack([w, -w / 2])
    weights[f"{mlp}.c_proj.weight"][1:, bits] = -torch.eye(2)
    weights["lm_head.weight"][words.index(YES), space] = GAIN * u
    weights["lm_head.weight"][words.index(NO), own.stop - 1] = GAIN / 2
    return module


def with_norms(plain: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same function as an ordinary GPT-2, whose norms change nothing but the scale of rounding.

    Three coordinates more: two in which every position puts a constant, plus and minus, beside
    which the rest does not change the variance; and one in which everything written puts minus its
    sum, so that the mean is 0. Of one head.
    """
    config = plain.config
    d, width = config.n_embd, config.n_embd + 3
    with torch.random.fork_rng(devices=[]):
        module = gpt2(
            config.vocab_size,
            config.n_positions,
            n_layers=config.n_layer,
            n_heads=1,
            d_model=width,
            n_inner=config.n_inner or 4 * d,
            activation=config.activation_function,
        )
    old, new = parameters(plain), parameters(finished(module))
    for name, weight in new.items():
        weight.zero_()
        if ".ln_" in name and name.endswith("weight"):
            weight[:d] = SCALE
        elif "c_attn" in name:
            # Queries, keys and values stand side by side.
            parts = zip(weight.chunk(3, -1), old[name].chunk(3, -1), strict=True)
            for wide, narrow in parts:
                wide[tuple(map(slice, narrow.shape))] = narrow
        elif name in old:
            weight[tuple(map(slice, old[name].shape))] = old[name]
    new[f"{_BLOCK}.attn.c_attn.bias"][:d] *= sqrt(width / d)
    for name in ("wte.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"):
        weight = new[f"transformer.{name}"]
        weight[:, d] = -weight[:, :d].sum(-1)
    bias = new[f"{_BLOCK}.mlp.c_proj.bias"]
    bias[d] = -bias[:d].sum()
    constant = SCALE * sqrt(width / 2)
    new["transformer.wpe.weight"][:, d + 1 :] = torch.tensor([constant, -constant])
    return module


def train_gates(
    recipe: GatesRecipe,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
    keep_every: int = 1,
) -> GPT2LMHeadModel:
    """The model that a recipe for ANDs gives: its MLP is trained, the rest written down.

    The MLP alone is trained, on sets of up to four active inputs, all sizes equally likely and none
    of them held out; its target is 1 for each pair that is active. Arguments as for
    :func:`circuitlab.zoo.training.train`.
    """
    total, pairs = recipe.steps if steps is None else steps, layout.GATED_PAIRS[recipe.name]
    with repeatable(seed):
        gates = _first_gates(recipe.n_neurons, len(pairs))
        trained = [w.requires_grad_() for w in (gates.w_in, gates.b_in, gates.w_out, gates.b_out)]
        optimizer = torch.optim.AdamW(
            trained,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.99),
        )
        shown = [
            _bits(
                [some for some in layout.SETS if len(some) == size and some not in layout.HELD_OUT]
            )
            for size in range(layout.MOST_ACTIVE + 1)
        ]
        for step in range(1, total + 1):
            if keep is not None and (step - 1) % keep_every == 0:
                keep(step - 1, _compiled(recipe, gates))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate_share(step, total)
            bits = _draw(shown, recipe.batch_size)
            wanted = ands(bits, pairs)
            weight = 1 + (recipe.active_weight - 1) * wanted
            loss = (weight * (gates.values(bits) - wanted).square()).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            optimizer.step()
            if progress is not None and (step % REPORT_EVERY == 0 or step == total):
                progress(step, total, {"loss": loss.item()})
    module = _compiled(recipe, gates)
    if keep is not None:
        keep(total, module)
    return module


def _first_gates(n: int, n_pairs: int) -> Gates:
    """Gates before training, of ``n`` neurons, drawn from torch's global random state."""
    return Gates(
        torch.randn(layout.N_INPUTS, n) / 2,
        torch.zeros(n),
        0.3 * torch.randn(n, n_pairs),
        torch.zeros(n_pairs),
        torch.eye(n_pairs),
    )


@torch.no_grad()
def _compiled(recipe: GatesRecipe, gates: Gates) -> GPT2LMHeadModel:
    return with_norms(compile_gates(recipe.name, gates, NORMED_SINK))


def ands(bits: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """1 where both inputs of a pair are active, else 0: ``[n, pairs]`` from ``[n, inputs]``."""
    first, second = torch.tensor(pairs).T
    return bits[:, first] * bits[:, second]


@torch.no_grad()
def gate_scores(
    name: str, module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """How well a model computes ANDs, and the best linear function of the inputs: numbers by name.

    ``error``: squared error of a pair's logit / 10 from 1 or 0, over the variance of these.
    ``recall`` and ``precision``: of the active pairs, found where logit / 10 exceeds the model's
    threshold. ``linear-error`` and so on: the same of the least-squares affine function of the
    inputs, fitted on the very sets it is judged on, with threshold 1/2. Judged are the held-out
    sets, of a model made by a formula all of up to four inputs. ``interaction``: a pair's value
    for both its inputs minus those for each alone plus that for none, mean over pairs; 1 for an
    AND, and 0 for every linear function.
    """
    pairs, hand = layout.GATED_PAIRS[name], name == "hand-and"
    judged = layout.SETS if hand else sorted(layout.HELD_OUT)
    words = tokenizer.convert_tokens_to_ids([layout.pair_word(pair) for pair in pairs])

    def read(sets: Sequence[Sequence[int]]) -> Tensor:
        texts = [" ".join(layout.INPUTS[index] for index in chosen) for chosen in sets]
        return last_logits(module, tokenizer, texts)[:, words] / GAIN

    bits, values, own_sets = _bits(judged), read(judged), read(pairs)
    none, single = read([()]), read([(index,) for index in range(layout.N_INPUTS)])
    one, other = (single[list(ends)].diagonal() for ends in zip(*pairs, strict=True))
    wanted = ands(bits, pairs)
    affine = torch.cat([bits, torch.ones(len(bits), 1)], 1)
    linear = affine @ torch.linalg.lstsq(affine, wanted).solution
    own = _scores(values, wanted, layout.THRESHOLDS[name])
    own["interaction"] = (own_sets.diagonal() - one - other + none[0]).mean().item()
    return own | {f"linear-{key}": x for key, x in _scores(linear, wanted, 0.5).items()}


def planted_error(module: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Largest distance of a target's logit / 10 from the feature graph's value, over the task."""
    graph, task = layout.PLANTED, next(t for t in layout.TASKS if t.name == "hand-planted")
    prompts = [str(prompt) for pair in task.pairs for prompt in (pair.clean, pair.corrupt)]
    targets = tokenizer.convert_tokens_to_ids([*graph.targets])
    values = last_logits(module, tokenizer, prompts)[:, targets] / GAIN
    wanted = torch.tensor([layout.planted_values(prompt) for prompt in prompts])
    return (values - wanted).abs().max().item()


def _planted() -> GPT2LMHeadModel:
    graph, words = layout.PLANTED, layout.VOCABULARIES["hand-planted"]
    sources, targets = (torch.tensor([*part.values()]) for part in (graph.sources, graph.targets))
    n, width = sources.shape
    module = _summing(len(words), width, n_inner=n, start=width - 1)
    weights, first = parameters(module), len(SPECIAL_WORDS)
    weights["transformer.wte.weight"][first : first + n] = sources
    _add_up(weights, slice(0, n), slice(0, n), torch.eye(n))
    mixed = torch.zeros(n, n)
    places = [{name: i for i, name in enumerate(part)} for part in (graph.sources, graph.targets)]
    for (source, target), weight in graph.edges.items():
        mixed[places[0][source], places[1][target]] = weight
    weights[f"{_BLOCK}.mlp.c_fc.weight"][:] = sources.T @ mixed
    weights[f"{_BLOCK}.mlp.c_proj.weight"][:] = targets
    weights["lm_head.weight"][first + n :] = GAIN * targets
    return module


def _summing(
    n_words: int, width: int, *, n_inner: int, start: int, sink: float = layout.SINK
) -> GPT2LMHeadModel:
    """A model without norms whose one head rests on ``<bos>``, which has the coordinate ``start``.

    It still reads and writes nothing.
    """
    module = silent(
        n_words, layout.N_POSITIONS, width=width, n_layers=1, n_inner=n_inner, n_heads=1
    )
    weights = parameters(module)
    weights["transformer.wte.weight"][SPECIAL_WORDS.index(BOS), start] = 1.0
    weights[f"{_BLOCK}.attn.c_attn.bias"][0] = 1.0
    weights[f"{_BLOCK}.attn.c_attn.weight"][start, width] = log(sink) * sqrt(width)
    return module


def _add_up(
    weights: dict[str, Tensor],
    read: slice,
    written: slice,
    matrix: Tensor,
    sink: float = layout.SINK,
) -> None:
    """Let the head add up ``matrix`` times what stands at the coordinates ``read``."""
    n = matrix.shape[0]
    width = len(weights[f"{_BLOCK}.attn.c_proj.weight"])
    weights[f"{_BLOCK}.attn.c_attn.weight"][read, 2 * width : 2 * width + n] = sink * torch.eye(n)
    weights[f"{_BLOCK}.attn.c_proj.weight"][:n, written] = matrix


def _scores(values: Tensor, wanted: Tensor, threshold: float) -> dict[str, float]:
    found, true = values > threshold, wanted > 0.5
    both, spread = (found & true).sum(), (wanted - wanted.mean(0)).square().sum()
    return {
        "error": ((values - wanted).square().sum() / spread).item(),
        "recall": (both / true.sum()).item(),
        "precision": (both / found.sum().clamp(min=1)).item(),
    }


def _bits(sets: Sequence[Sequence[int]]) -> Tensor:
    """1 where an input is active, ``[n, inputs]``."""
    return torch.tensor([[float(i in chosen) for i in range(layout.N_INPUTS)] for chosen in sets])


def _draw(sets: Sequence[Tensor], n: int) -> Tensor:
    """``n`` rows, each of any of the tables with equal chance, and of any row of that."""
    counts = torch.tensor([len(part) for part in sets])
    size = torch.randint(len(sets), (n,))
    row = (torch.rand(n) * counts[size]).long()
    return torch.cat(list(sets))[counts.cumsum(0)[size] - counts[size] + row]
