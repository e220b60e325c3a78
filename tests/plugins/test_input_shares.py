"""What the parts of a head's input do: against loops over prompts, queries and keys."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import oracles
import pytest
import torch
from circuitlab_attention_heads.ov import centred_unembedding, ov_circuit
from circuitlab_attention_heads.shares import Shares, input_shares
from dense_heads import Dense, divisor
from families import ALL_FAMILIES, random_module, traced, unchecked
from folded_oracles import watching, window
from torch import Tensor, nn

from circuitlab import ModelError, Tokens, TracedModel, load_model, zoo

HEAD, EARLIER = (1, 1), (0, 1)
PROMPTS = [(3, 1, 4, 1, 5, 9), (2, 6, 5), (7,), (30, 31, 32, 30)]
MODULES = {
    "gpt2": oracles.random_gpt2,
    "gpt2-no-norms": lambda: oracles.random_gpt2(layer_norm=False),
    **{name: lambda name=name: random_module(name) for name in ALL_FAMILIES},
}
TOLERANCES = dict.fromkeys(ALL_FAMILIES, 1e-4)


@cache
def case(name: str) -> tuple[Any, TracedModel]:
    module = MODULES[name]()
    gpt2 = name.startswith("gpt2")
    return module, load_model((module, None)) if gpt2 else traced(module)


def measured(model: TracedModel, head: tuple[int, int], **options: Any) -> Shares:
    batches = options.pop("batches", None) or [model.tokens(PROMPTS)]
    written = ov_circuit(model, head, centred_unembedding(model)).written
    return input_shares(model, batches, head, written, **options)


class Brute:
    """One prompt after the other on the plain model, one query and key at a time."""

    def __init__(
        self, name: str, module: Any, head: tuple[int, int], through: tuple[int, int] | None
    ) -> None:
        self.name, self.module, self.dense = name, module, Dense(module, head)
        self.through = None if through is None else Dense(module, through)
        self.scores: Any = 0.0
        self.values: Any = 0.0
        self.logits = self.of_scores = self.of_values = self.of_logits = 0.0
        for prompt in PROMPTS:
            self.add(torch.tensor(prompt))

    @torch.no_grad()
    def add(self, ids: Tensor) -> None:
        dense = self.dense
        with watching(self.module) as kept:
            done = self.module(ids[None], output_hidden_states=True, output_attentions=True)
        self.seen = {part: kept[path] for path, part in self.module.named_modules() if path in kept}
        stream = done.hidden_states[dense.layer][0].double()
        parts = [dense.tokens[ids]]
        if dense.kind == "gpt2":
            parts.append(dense.positions[: len(ids)])
        if self.through is not None:
            parts.append(self.written(self.through, done))
        if dense.layer:
            parts.append(stream - sum(parts))
        sigma, pattern = divisor(dense.norm, stream), done.attentions[dense.layer][0]
        read = {
            p: [*(x / sigma @ dense.weight(p) for x in parts), dense.bias(p).expand(len(ids), -1)]
            for p in "qkv"
        }
        for p in "qk":
            read[p] = [part / self.divided(dense, p) for part in read[p]]
        cap = 2.0 if dense.kind == "gemma2" else 0.0
        for i in range(len(ids)):
            seen = range(max(0, i + 1 - window(self.name, dense.layer)), i + 1)
            table = torch.zeros(len(read["q"]), len(read["q"]), len(seen)).double()
            for place, j in enumerate(seen):
                turn = dense.turn(i - j)
                for a, q in enumerate(read["q"]):
                    for b, k in enumerate(read["k"]):
                        table[a, b, place] = dense.scale * q[i] @ turn @ k[j]
            if cap:
                raw = table.sum((0, 1))
                table = table * (cap * torch.tanh(raw / cap) / raw)
            table = table - table.mean(-1, keepdim=True)
            whole = table.sum((0, 1))
            self.scores = self.scores + (table * whole).sum(-1)
            self.of_scores += float(whole @ whole)
        head = pattern[dense.head].double()
        outputs = torch.stack([head @ v @ dense.o for v in read["v"]]) / self.divided(dense, "z")
        whole = outputs.sum(0)
        self.values = self.values + (outputs * whole).sum((1, 2))
        self.of_values += float((whole * whole).sum())
        logits = self.seen[self.module.lm_head][1][0, -1].double()
        logits = logits - logits.mean()
        last = self.seen[dense.final][0][0, -1].double()
        own = whole[-1] / divisor(dense.final, last) @ dense.unembedding
        self.logits += float(own @ logits)
        self.of_logits += float(logits @ logits)

    def written(self, dense: Dense, done: Any) -> Tensor:
        """What an earlier head writes, not centred."""
        stream = done.hidden_states[dense.layer][0].double()
        v = stream / divisor(dense.norm, stream) @ dense.weight("v") + dense.bias("v")
        rows = slice(dense.head * dense.d_head, (dense.head + 1) * dense.d_head)
        pattern = done.attentions[dense.layer][0, dense.head].double()
        if dense.behind is not None:
            return pattern @ v @ dense.o / self.divided(dense, "z")
        return pattern @ v @ dense.output.detach().double()[rows]

    def divided(self, dense: Dense, port: str) -> Any:
        """What the norm of queries or keys, or behind the attention, divides by: ``[pos, 1]``."""
        norm = dense.behind if port == "z" else getattr(dense.attention, f"{port}_norm", None)
        if norm is None:
            return 1.0
        given = self.seen[norm][0][0].double()
        scale = divisor(norm, given)
        if given.ndim < 3:
            return scale
        heads = 0 if dense.kind == "gemma3_text" else 1
        return scale.movedim(heads, 0)[dense.head * given.shape[heads] // dense.n_heads]


@pytest.mark.parametrize(("head", "through"), [((0, 1), None), (HEAD, None), (HEAD, EARLIER)])
@pytest.mark.parametrize("name", MODULES)
def test_shares_are_those_of_loops(name: str, head: Any, through: Any) -> None:
    """Scores by both parts, outputs and logits; padded prompts as each alone."""
    module, model = case(name)
    brute, found = Brute(name, module, head, through), measured(model, head, through=through)
    assert found.scores is not None
    assert found.values is not None
    tolerance = TOLERANCES.get(name, 1e-9)
    assert float((found.scores - brute.scores / brute.of_scores).abs().max()) < tolerance
    assert float((found.values - brute.values / brute.of_values).abs().max()) < tolerance
    assert found.logits == pytest.approx(brute.logits / brute.of_logits, abs=tolerance)
    learned, later = ["position"] * name.startswith("gpt2"), ["earlier"] * head[0]
    named = [] if through is None else ["a0.h1"]
    assert list(found.parts) == ["token", *learned, *named, *later, "bias"]


@pytest.mark.parametrize("name", MODULES)
def test_shares_add_up(name: str) -> None:
    """All parts make up the whole; b_K has no share, unless it is turned."""
    _, model = case(name)
    found = measured(model, HEAD, through=EARLIER)
    assert found.scores is not None
    assert found.values is not None
    assert float(found.scores.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(found.values.sum()) == pytest.approx(1.0, abs=1e-5)
    of_bias = float(found.scores[:, -1].abs().max())
    turned = ("qwen2", "neox", "neox-sequential")
    assert of_bias > 1e-4 if name in turned else of_bias < 1e-12


def test_batches_do_not_matter() -> None:
    """Prompts one by one, or padded together."""
    _, model = case("gpt2")
    together = measured(model, HEAD)
    tokens = model.tokens(PROMPTS)
    apart = measured(model, HEAD, batches=[tokens.rows(n) for n in range(len(PROMPTS))])
    for name in ("scores", "values"):
        assert float((getattr(together, name) - getattr(apart, name)).abs().max()) < 1e-10
    assert together.logits == pytest.approx(apart.logits, abs=1e-10)
    assert together.scales == pytest.approx(apart.scales, rel=1e-10)


def test_scales_are_means_over_real_tokens() -> None:
    """1/σ of the head's norm and the earlier one's at all tokens, of the final one at the last."""
    module, model = case("gpt2")
    streams: dict[int | None, list[Tensor]] = {0: [], 1: [], None: []}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        seen: list[Tensor] = []
        hook = module.transformer.ln_f.register_forward_pre_hook(
            lambda _, x, seen=seen: seen.append(x[0])
        )
        with torch.no_grad():
            done = module(ids, output_hidden_states=True)
        hook.remove()
        for layer in (0, 1):
            streams[layer].append(done.hidden_states[layer][0])
        streams[None].append(seen[0][0, -1:])
    norms = {0: module.transformer.h[0].ln_1, 1: module.transformer.h[1].ln_1}
    norms[None] = module.transformer.ln_f
    expected = {
        layer: float((1 / divisor(norms[layer], torch.cat(parts))).mean())
        for layer, parts in streams.items()
    }
    assert measured(model, HEAD, through=EARLIER).scales == pytest.approx(expected, rel=1e-9)


# --- known heads ----------------------------------------------------------------------------------


def test_compiled_heads_do_what_they_were_compiled_for() -> None:
    """hand-induction: positions decide for a0.h0, token and what a0.h0 wrote for a1.h0."""
    model = load_model("hand-induction")
    task = next(task for task in zoo.tasks() if task.name == "hand-induction")
    clean = model.encode(task).clean
    previous = measured(model, (0, 0), batches=[clean])
    assert previous.parts == ("token", "position", "bias")
    assert previous.scores is not None
    assert float(previous.scores[1, 1]) == pytest.approx(1.0, abs=1e-9)
    induction = measured(model, (1, 0), batches=[clean], through=(0, 0))
    row, column = (induction.parts.index(part) for part in ("token", "a0.h0"))
    assert induction.scores is not None
    assert float(induction.scores[row, column]) == pytest.approx(1.0, abs=1e-9)
    assert induction.values is not None
    assert float(induction.values[row]) == pytest.approx(1.0, abs=1e-9)
    assert induction.logits == pytest.approx(1.0, abs=1e-6)


def test_idle_heads_have_no_shares() -> None:
    """Scores that are equal, or only b_K's, and outputs that are 0, are not divided by 0."""
    module: Any = oracles.random_gpt2()
    attention = module.transformer.h[1].attn
    attention.c_attn.weight.data[:, 8:16] = 0
    attention.c_attn.bias.data[8:16] = 0
    attention.c_proj.weight.data[8:16] = 0
    module.transformer.h[1].ln_1.bias.data[:] = 0
    found = measured(load_model((module, None)), HEAD)
    assert found.scores is None
    assert found.values is None
    assert found.logits == pytest.approx(0.0, abs=1e-12)
    single = measured(load_model((module, None)), (0, 0), batches=[Tokens(*_one_token())])
    assert single.scores is None
    assert single.values is not None


def _one_token() -> tuple[Tensor, Tensor]:
    return torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool)


# --- models whose circuits cannot be read ---------------------------------------------------------


def test_other_embeddings_are_refused() -> None:
    """A model that scales its embeddings has circuits of other vectors than its table's rows."""

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module: Any = oracles.random_gpt2()
    module.transformer.drop = Doubled()
    with pytest.raises(ModelError, match=r"block 0 of model .* does not read the sum of token and"):
        measured(unchecked(module), HEAD)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_other_attention_is_refused(family: str) -> None:
    """A scale or a rotation that is not the described one gives other patterns."""
    module, _ = case(family)
    model = unchecked(module)
    change: dict[str, Any] = {"rotary": ""} if family == "neox" else {"score_scales": (0.1, 3.0)}
    wrong = TracedModel(module, None, replace(model.architecture, **change), name="toy")
    with pytest.raises(ModelError, match=r"a1.h1 of model 'toy' does not attend by the softmax"):
        measured(wrong, HEAD)
