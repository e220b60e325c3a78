"""QK and OV circuits against dense matrices, the model's own scores, and heads with known ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import oracles
import pytest
import torch
from circuitlab_attention_heads.ov import OVCircuit, centred_unembedding, ov_circuit
from circuitlab_attention_heads.qk import QKCircuit, qk_circuit
from dense_heads import Dense, divisor
from families import ALL_FAMILIES, random_module, unchecked
from torch import Tensor

from circuitlab import OptionError, TracedModel, load_model

HEAD, EARLIER = (1, 1), (0, 1)
MODULES = {
    "gpt2": oracles.random_gpt2,
    "gpt2-no-norms": lambda: oracles.random_gpt2(layer_norm=False),
    "gpt2-float32": lambda: oracles.random_gpt2(dtype=torch.float32),
    **{name: lambda name=name: random_module(name, dtype=torch.float64) for name in ALL_FAMILIES},
}
ROTARY = ALL_FAMILIES
LEARNED = [name for name in MODULES if name not in ALL_FAMILIES]
TOKENS, POSITIONS = torch.tensor([3, 17, 0, 39, 8]), torch.tensor([0, 5, 15])


@cache
def case(name: str) -> tuple[Any, TracedModel]:
    module = MODULES[name]()
    return module, unchecked(module)


def tolerance(name: str) -> float:
    """Weights are folded in float64; cosines of rotary embeddings are float32."""
    return 1e-5 if name in ROTARY else 1e-10


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


# --- QK -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("name", MODULES)
def test_blocks_are_those_of_dense_matrices(name: str, offset: int) -> None:
    """Every block of tokens, positions and biases, of all tokens and of chosen ones."""
    module, model = case(name)
    dense, circuit = Dense(module, HEAD), qk_circuit(model, HEAD, offset=offset)
    everything = torch.arange(40)
    blocks = circuit.blocks(TOKENS, POSITIONS)
    turn, queries, keys = dense.turn(offset), {}, {}
    for side, port in ((queries, "q"), (keys, "k")):
        side["token"] = dense.tokens[TOKENS] @ dense.weight(port)
        side["bias"] = dense.bias(port)[None]
        if name in LEARNED:
            side["position"] = dense.positions[POSITIONS] @ dense.weight(port)
    assert set(blocks) == {(q, k) for q in queries for k in keys}
    for (q, k), block in blocks.items():
        expected = dense.scale * queries[q] @ turn @ keys[k].T
        assert float((block - expected).abs().max()) < tolerance(name)
    whole = circuit.blocks(everything, POSITIONS)["token", "token"]
    assert apart(whole, dense.tokens @ dense.qk(offset) @ dense.tokens.T) < tolerance(name)


@pytest.mark.parametrize("name", LEARNED)
def test_blocks_add_up_to_the_models_own_scores(name: str) -> None:
    """In layer 0 token t at i for token u at j: the norm and projection as the model has them."""
    module, model = case(name)
    dense, circuit = Dense(module, EARLIER), qk_circuit(model, EARLIER)
    stream = (dense.tokens[TOKENS][:, None] + dense.positions[POSITIONS]).to(model.dtype)
    with torch.no_grad():
        made = dense.attention.c_attn(dense.norm(stream)).unflatten(-1, (3, 2, 8))[..., 1, :]
    q, k, _ = made.double().unbind(2)
    expected = dense.scale * torch.einsum("tid,ujd->tiuj", q, k)
    blocks, sigma = circuit.blocks(TOKENS, POSITIONS), divisor(dense.norm, stream.double())[..., 0]
    query, key = sigma[:, :, None, None], sigma[None, None]
    found = (
        blocks["token", "token"][:, None, :, None] / query / key
        + blocks["token", "position"][:, None, None] / query / key
        + blocks["position", "token"][None, :, :, None] / query / key
        + blocks["position", "position"][None, :, None] / query / key
        + blocks["bias", "token"][0][None, None, :, None] / key
        + blocks["bias", "position"][0] / key
        + blocks["token", "bias"][:, :, None, None] / query
        + blocks["position", "bias"][None, :, :, None] / query
        + blocks["bias", "bias"][0, 0]
    )
    assert apart(found, expected) < (1e-5 if name == "gpt2-float32" else 1e-10)


@pytest.mark.parametrize("name", ROTARY)
def test_turned_blocks_add_up_to_the_models_own_scores(name: str) -> None:
    """The same by offset, where positions are rotations: token t at 9 for token u at 5."""
    module, model = case(name)
    dense, circuit = Dense(module, EARLIER), qk_circuit(model, EARLIER, offset=4)
    with torch.no_grad():
        normal = dense.norm(dense.tokens[TOKENS].to(model.dtype)).double()
    (w_q, b_q), (w_k, b_k) = dense.raw("q"), dense.raw("k")
    q, k = (normal @ w_q + b_q) * dense.gain("q"), (normal @ w_k + b_k) * dense.gain("k")
    expected = dense.scale * (q @ dense.turn(9)) @ (k @ dense.turn(5)).T
    sigma = divisor(dense.norm, dense.tokens[TOKENS])
    blocks = circuit.blocks(TOKENS, POSITIONS)
    found = blocks["token", "token"] / sigma / sigma.T + blocks["bias", "token"] / sigma.T
    found = found + blocks["token", "bias"] / sigma + blocks["bias", "bias"]
    assert apart(found, expected) < 1e-5


def test_the_bias_of_keys_cancels_in_the_softmax() -> None:
    """Of a GPT-2, whatever b_K is, the pattern stays as it is; b_Q does change it."""
    module: Any = oracles.random_gpt2()
    ids, width = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), 16
    patterns = []
    for port in (None, 1, 0):
        if port is not None:
            module.transformer.h[1].attn.c_attn.bias.data[port * width : (port + 1) * width] += 7.0
        with torch.no_grad():
            patterns.append(module(ids, output_attentions=True).attentions[1])
    assert float((patterns[0] - patterns[1]).abs().max()) < 1e-12
    assert float((patterns[1] - patterns[2]).abs().max()) > 0.1
    blocks = qk_circuit(load_model((module, None)), HEAD).blocks(TOKENS, POSITIONS)
    assert {block.shape[1] for (_, key), block in blocks.items() if key == "bias"} == {1}


def test_turned_the_bias_of_keys_does_not_cancel() -> None:
    """With rotary embeddings it prefers some distances: its term is not the same for all keys."""
    _, model = case("qwen2")
    near, far = (qk_circuit(model, HEAD, offset=n).blocks(TOKENS, POSITIONS) for n in (1, 6))
    assert float((near["token", "bias"] - far["token", "bias"]).abs().max()) > 0.1
    assert float((near["bias", "bias"] - far["bias", "bias"]).abs().max()) > 0.01


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_matching_is_that_of_all_eigenvalues(name: str, offset: int) -> None:
    """Σ λ / Σ |λ| of the dense table; its other eigenvalues are 0."""
    module, model = case(name)
    dense, circuit = Dense(module, HEAD), qk_circuit(model, HEAD, offset=offset)
    values = torch.linalg.eigvals(dense.tokens @ dense.qk(offset) @ dense.tokens.T)
    expected = values.real.sum() / values.abs().sum()
    assert circuit.matching() == pytest.approx(float(expected), abs=1e-5)
    largest = values.abs().sort(descending=True).values[: circuit.eigenvalues().numel()]
    assert apart(circuit.eigenvalues().abs().sort(descending=True).values, largest) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt2-no-norms", "llama"])
def test_keys_through_an_earlier_head_are_the_composed_circuit(name: str) -> None:
    """W_E W_QK (W_OV)^T W_E^T and its position blocks, all tokens by all tokens."""
    module, model = case(name)
    dense, earlier = Dense(module, HEAD), Dense(module, EARLIER)
    circuit = qk_circuit(model, HEAD, through=EARLIER)
    blocks = circuit.blocks(torch.arange(40), POSITIONS)
    composed = dense.qk() @ earlier.ov.T
    assert apart(blocks["token", "token"], dense.tokens @ composed @ dense.tokens.T) < 1e-9
    if name in LEARNED:
        expected = dense.positions[POSITIONS] @ composed @ dense.positions[POSITIONS].T
        assert apart(blocks["position", "position"], expected) < 1e-9
    values = torch.linalg.eigvals(dense.tokens @ composed @ dense.tokens.T)
    expected = values.real.sum() / values.abs().sum()
    assert circuit.matching() == pytest.approx(float(expected), abs=1e-5)


def test_best_keys_are_counted_over_all_tokens() -> None:
    """A token counts where no other key, chosen or not, scores as high."""
    module, model = case("gpt2")
    dense, circuit = Dense(module, HEAD), qk_circuit(model, HEAD)
    table = dense.tokens @ dense.qk() @ dense.tokens.T
    own = int((table.argmax(1) == torch.arange(40)).sum())
    assert circuit.best_keys(torch.arange(40)) == (own, 40)
    # Against W_K = W_Q, on tokens of one length, each finds itself.
    same = torch.nn.functional.normalize(circuit.token_queries, dim=1)
    unit = QKCircuit(same, same, None, None, circuit.q_bias, circuit.k_bias, None, 0.5)
    assert unit.best_keys(TOKENS) == (5, 5)
    assert unit.matching() == pytest.approx(1.0, abs=1e-9)
    against = QKCircuit(same, -same, None, None, circuit.q_bias, circuit.k_bias, None, 0.5)
    assert against.matching() == pytest.approx(-1.0, abs=1e-9)
    # A second token just like the first: a tie is not won.
    twins = torch.cat([same, same])
    tied = QKCircuit(twins, twins, None, None, circuit.q_bias, circuit.k_bias, None, 0.5)
    assert tied.best_keys(TOKENS) == (0, 5)


def test_an_idle_head_has_no_matching() -> None:
    """Scores that are all 0 say nothing, and no number is made of them."""
    module: Any = oracles.random_gpt2()
    module.transformer.h[1].attn.c_attn.weight.data[:, 8:16] = 0
    model = load_model((module, None))
    circuit = qk_circuit(model, HEAD)
    assert circuit.matching() is None
    assert circuit.best_keys(TOKENS) == (0, 0)
    assert qk_circuit(model, (1, 0)).matching() is not None


def test_a_rotation_matches_by_its_cosine() -> None:
    """Queries that are keys turned by θ in the plane match by cos θ."""
    plane = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double()
    plane = torch.linalg.qr(plane)[0]
    for angle in (0.0, 1.0, 2.5):
        c, s = (float(f(torch.tensor(angle))) for f in (torch.cos, torch.sin))
        turned = plane @ torch.tensor([[c, s], [-s, c]]).double()
        bias = torch.zeros(2)
        found = QKCircuit(turned, plane, None, None, bias, bias, None, 1.0).matching()
        assert found == pytest.approx(c, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"through": (1, 0)}, "--through a1.h0 writes nothing that a1.h1 reads; .* before 1"),
        ({"offset": -1}, "--offsets -1: a query stands 0 to 15 positions behind"),
        ({"offset": 16}, "--offsets 16: "),
    ],
)
def test_what_does_not_exist_is_refused(options: dict[str, Any], message: str) -> None:
    """A head that runs later, and offsets no prompt has."""
    _, model = case("gpt2")
    with pytest.raises(OptionError, match=message):
        qk_circuit(model, HEAD, **options)


# --- OV -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_outputs_are_those_of_dense_matrices(name: str) -> None:
    """W_E W_OV W_U of all tokens, and the constant write of b_V, centred over the vocabulary."""
    module, model = case(name)
    dense = Dense(module, HEAD)
    circuit = ov_circuit(model, HEAD, centred_unembedding(model))
    expected = dense.tokens @ dense.ov @ dense.unembedding
    assert apart(circuit.logits(torch.arange(40)), expected) < 1e-10
    assert apart(circuit.logits(TOKENS), expected[TOKENS]) < 1e-10
    constant = dense.bias("v") @ dense.o @ dense.unembedding
    assert float((circuit.constant() - constant).abs().max()) < 1e-10
    assert float(circuit.logits(TOKENS).mean(1).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_a_single_key_writes_its_outputs(name: str) -> None:
    """A head that sees one token adds its row and the constant to the logits, over the scales."""
    module, model = case(name)
    dense, token = Dense(module, EARLIER), 17
    circuit = ov_circuit(model, EARLIER, centred_unembedding(model))
    stream = dense.tokens[token] + (dense.positions[0] if name == "gpt2" else 0)
    if name == "gpt2":
        circuit = OVCircuit(
            circuit.token_values + dense.positions[0] @ dense.weight("v"),
            circuit.written,
            circuit.v_bias,
        )
    (weight, bias), rows = dense.raw("v"), slice(8, 16) if name == "gpt2" else slice(4, 8)
    with torch.no_grad():
        write = (dense.norm(stream) @ weight + bias) @ dense.output.detach()[rows]
        last = torch.linspace(-1, 2, 16).double() ** 3
        scale = divisor(dense.final, last)
        # The final norm with its scale held: gain and unembedding of the centred write.
        direct = (write - write.mean()) / scale * dense.final.weight
        expected = module.lm_head(direct)
    found = circuit.logits(torch.tensor([token]))[0] / divisor(dense.norm, stream)
    found = (found + circuit.constant()) / scale
    assert apart(found, expected - expected.mean()) < 1e-9


def test_large_unembeddings_are_read_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """They give the same outputs, to the rounding of that type."""
    _, model = case("gpt2")
    wide = ov_circuit(model, HEAD, centred_unembedding(model))
    monkeypatch.setattr("circuitlab_attention_heads.ov._LARGE", 10)
    monkeypatch.setattr("circuitlab_attention_heads.vocabulary._ROWS", 7)
    narrow = ov_circuit(model, HEAD, centred_unembedding(model))
    assert narrow.written.dtype == torch.float32
    assert apart(narrow.logits(TOKENS).double(), wide.logits(TOKENS)) < 1e-5
    assert apart(narrow.constant().double(), wide.constant()) < 1e-5
