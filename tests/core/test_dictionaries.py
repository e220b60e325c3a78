"""What dictionaries compute, its gradients, and the same function written otherwise."""

from __future__ import annotations

from typing import Any

import dictionary_oracles as oracles
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from circuitlab import Dictionary, DictionaryInfo, NumericsError, OptionError, SiteError
from circuitlab.dictionaries import dictionary as module

EACH = [(kind, form) for kind in oracles.KINDS for form in oracles.FORMS]


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=tolerance, atol=tolerance)


# --- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "form"), EACH)
def test_it_computes_what_the_papers_write(kind: str, form: str) -> None:
    """Latents and reconstruction are those of loops over Python floats."""
    d, x = oracles.random_dictionary(kind, form), oracles.inputs()
    z, written = oracles.all_by_loops(d, x)
    assert 0 < (z > 0).double().mean() < 0.9
    same(d.encode(x), z)
    same(d(x), written)
    same(d.decode(z, x), written)
    same(d.l0(d.pre(x)), (z > 0).double().sum(-1))
    assert d.nonlinearity == kind


@pytest.mark.parametrize("block", [1 << 24, 30], ids=["one block", "many"])
@pytest.mark.parametrize(("kind", "form"), EACH)
def test_active_latents_are_all_there(
    kind: str, form: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse latents are the dense ones, each once, and decode to the same, with its gradients."""
    monkeypatch.setattr(module, "_BLOCK", block)
    d, x = oracles.random_dictionary(kind, form), oracles.inputs()
    indices, values = d.active(x)
    dense = torch.zeros(*x.shape[:-1], d.n, dtype=x.dtype)
    same(dense.scatter_add(-1, indices, values.detach()), d.encode(x))
    most = int((d.encode(x) > 0).sum(-1).max())
    assert indices.shape[-1] == (3 if kind == "topk" else most)
    weight = torch.linspace(-1, 1, d.d_out, dtype=x.dtype)
    (d.decode_active(indices, values, x) @ weight).square().sum().backward()
    sparse = {name: p.grad.clone() for name, p in d.named_parameters() if p.grad is not None}
    same(d.decode_active(indices, values, x), d(x))
    d.zero_grad()
    (d(x) @ weight).square().sum().backward()
    for name, parameter in d.named_parameters():
        if parameter.grad is not None and name != "threshold":
            same(sparse[name], parameter.grad, 1e-10)


def test_nothing_active() -> None:
    """Tokens without an active latent, and no tokens, are no special case."""
    d = oracles.random_dictionary()
    d.b_e.data -= 100.0
    indices, values = d.active(oracles.inputs())
    assert indices.shape == (4, 6, 1)
    assert not values.any()
    same(d.decode_active(indices, values), d.b_d.expand(4, 6, -1))
    assert d.active(torch.zeros(0, 5))[0].shape == (0, 1)


def test_error_is_what_is_missed() -> None:
    """Target less reconstruction; a transcoder's target is not what it reads."""
    x = oracles.inputs()
    d = oracles.random_dictionary()
    same(d.error(x), x - oracles.all_by_loops(d, x)[1])
    transcoder = oracles.random_dictionary(form="transcoder")
    target = oracles.inputs(7)
    same(transcoder.error(x, target), target - oracles.all_by_loops(transcoder, x)[1])
    with pytest.raises(OptionError, match=r"give error\(x, target\)"):
        transcoder.error(x)
    skip = oracles.random_dictionary(form="skip")
    with pytest.raises(OptionError, match=r"give decode\(z, x\)"):
        skip.decode(skip.encode(x))


def test_arithmetic_is_float32_at_least() -> None:
    """Coarse parameters and inputs are widened, and never the other way."""
    coarse = oracles.random_dictionary("gated", dtype=torch.bfloat16)
    assert {p.dtype for p in coarse.parameters()} == {torch.float32}
    assert coarse(oracles.inputs().bfloat16()).dtype == torch.float32
    fine = oracles.random_dictionary()
    assert fine(oracles.inputs().float()).dtype == torch.float64


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", oracles.KINDS)
def test_gradients_are_finite_differences(kind: str) -> None:
    """Where no latent is near its edge, autograd's gradients of ``z`` are the true ones, twice."""
    d = oracles.random_dictionary(kind, "input bias")
    x = oracles.inputs()[0, :3].clone().requires_grad_()
    edges = 0 if d.threshold is None else d.threshold.detach()
    assert float((d.pre(x).detach() - edges).abs().min()) > 1e-3
    assert gradcheck(d.encode, x)

    def squares(w_e: Tensor, b_e: Tensor, w_d: Tensor) -> Tensor:
        values = torch.func.functional_call(d, {"W_e": w_e, "b_e": b_e, "W_d": w_d}, (x,))
        return values.square().sum()  # type: ignore[no-any-return]  # functional_call is untyped

    given = [p.detach().clone().requires_grad_() for p in (d.W_e, d.b_e, d.W_d)]
    assert gradcheck(squares, given)
    assert torch.autograd.gradgradcheck(squares, given)


def test_topk_passes_gradients_to_the_selected_alone() -> None:
    """The gradient is 1 for what was selected and is above 0, and 0 for all else."""
    d = oracles.random_dictionary("topk", n=5)
    pre = torch.tensor([[3.0, 1.0, 2.0, 0.5, -1.0], [-1.0, -3.0, 4.0, -0.5, -2.0]]).double()
    pre.requires_grad_()
    d.activate(pre).sum().backward()
    assert pre.grad is not None
    assert pre.grad.tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 0, 0]]


def test_jumprelu_gradient_is_the_papers() -> None:
    """In the threshold -θ/ε within ε/2 of it, weighted by what comes from above; H(pre - θ) in pre.

    The penalty's is -1/ε there. A threshold below 0 counts as 0 and gets none.
    """
    theta = torch.tensor([0.5, 1.0, 2.0, -1.0]).double()
    d = oracles.random_dictionary("jumprelu", n=4, threshold=theta, bandwidth=0.2)
    rows = [[0.45, 1.05, 1.0, 0.05], [0.55, 0.95, 2.09, -0.05], [0.65, 1.2, 1.91, 3.0]]
    pre = torch.tensor(rows).double().requires_grad_()
    above = torch.tensor([[2.0, 3.0, 5.0, 1.0], [7.0, 11.0, 13.0, 1.0], [17.0, 19.0, 23.0, 1.0]])
    inside = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0]]
    by_hand = [
        sum(-(float(theta[j]) / 0.2) * inside[i][j] * float(above[i, j]) for i in range(3))
        for j in range(4)
    ]
    (d.activate(pre) * above).sum().backward()
    assert d.threshold is not None
    assert d.threshold.grad is not None
    assert pre.grad is not None
    same(d.threshold.grad, torch.tensor(by_hand).double())
    same(pre.grad, above.double() * (pre.detach() > theta.relu()))
    d.zero_grad()
    assert d.l0(pre).tolist() == [2.0, 2.0, 3.0]
    d.l0(pre).sum().backward()
    columns = [sum(row[j] for row in inside) for j in range(4)]
    same(d.threshold.grad, -5.0 * torch.tensor(columns).double())


def test_jumprelu_estimator_is_the_gradient_of_the_mean() -> None:
    """For pre-activations spread evenly over [0, 1], d mean(z)/dθ = -θ, and d mean(L0)/dθ = -1."""
    theta = torch.tensor([0.3, 0.6]).double()
    d = oracles.random_dictionary("jumprelu", n=2, threshold=theta, bandwidth=0.01)
    pre = torch.linspace(0, 1, 200_001).double()[:, None].expand(-1, 2)
    assert d.threshold is not None
    for value, wanted in ((d.activate(pre), -theta), (d.l0(pre)[:, None], -torch.ones(2))):
        d.zero_grad()
        value.mean(0).sum().backward()
        assert d.threshold.grad is not None
        same(d.threshold.grad, wanted.double(), 1e-3)
    moved = [pre[:, 0].where(pre[:, 0] > 0.3 + step, 0.0).mean() for step in (1e-3, -1e-3)]
    assert float(moved[0] - moved[1]) / 2e-3 == pytest.approx(-0.3, rel=1e-2)


@pytest.mark.parametrize("kind", oracles.KINDS)
def test_it_can_be_trained(kind: str) -> None:
    """Gradient steps lower the error, and a copy made from the state dict is the same."""
    d, x = oracles.random_dictionary(kind, dtype=torch.float32), oracles.inputs().float()
    optimiser = torch.optim.Adam(d.parameters(), lr=0.02)
    errors = []
    for _ in range(40):
        loss = d.error(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    assert errors[-1] < 0.5 * errors[0]
    copy = oracles.random_dictionary(kind, seed=5, dtype=torch.float32)
    copy.load_state_dict(d.state_dict())
    assert torch.equal(copy(x), d(x))


# --- the same function, written otherwise ---------------------------------------------------------


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize("kind", oracles.KINDS)
def test_conventions_of_the_input_bias_convert(kind: str, apply: bool) -> None:
    """Latents and reconstruction stay, there and back; setting the flag alone changes them."""
    x = oracles.inputs()
    d = oracles.random_dictionary(kind, "input bias" if apply else "plain")
    other = d.converted(apply_b_dec_to_input=not apply)
    assert other.apply_b_dec_to_input is not apply
    same(other.encode(x), d.encode(x))
    same(other(x), d(x))
    back = other.converted(apply_b_dec_to_input=apply)
    for name, parameter in d.named_parameters():
        same(back.get_parameter(name), parameter)
    wrong = d.converted(apply_b_dec_to_input=apply)
    wrong.apply_b_dec_to_input = not apply
    assert float((wrong(x) - d(x)).detach().abs().max()) > 0.1


def test_a_transcoder_has_no_input_bias() -> None:
    """Its decoder's bias is at home at another site."""
    d, x = oracles.random_dictionary(form="transcoder"), oracles.inputs()
    same(d.converted(apply_b_dec_to_input=False)(x), d(x))
    with pytest.raises(OptionError, match="at home at another site"):
        d.converted(apply_b_dec_to_input=True)


@pytest.mark.parametrize("form", oracles.FORMS)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_rows_of_norm_one(kind: str, form: str) -> None:
    """Rows get norm 1, a row of 0 stays, latents scale by the norms, and the function is the same.

    The gain of a gated latent's magnitude stays: scaling it too would square the norm.
    """
    d, x = oracles.random_dictionary(kind, form), oracles.inputs()
    d.W_d.data[2] = 0.0
    unit = d.normalised()
    norms = d.W_d.detach().norm(dim=1)
    assert sorted(unit.W_d.detach().norm(dim=1).round(decimals=9).tolist()) == [0.0] + [1.0] * 8
    same(unit.encode(x), d.encode(x) * norms.where(norms > 0, 1.0))
    same(unit(x), d(x))
    same(unit.normalised().W_e, unit.W_e)


def close_pair() -> Dictionary:
    """Two latents, the first larger by 1e-6, the second with a row longer by 5e-6."""
    w_e = torch.tensor([[1.0, 1.0 - 1e-6]], dtype=torch.float64)
    w_d = torch.tensor([[1.0], [1.0 + 5e-6]], dtype=torch.float64)
    zeros = torch.zeros(2)
    return Dictionary(w_e, zeros, w_d, zeros[:1], k=1, apply_b_dec_to_input=False)


def test_rows_of_topk_are_scaled_only_together() -> None:
    """Scaled one by one, others would be selected; scaled alike, the function is the same."""
    d, x = oracles.random_dictionary("topk"), oracles.inputs()
    norms = d.W_d.detach().norm(dim=1)
    naive = oracles.random_dictionary("topk")
    for name, value in (("W_e", d.W_e * norms), ("b_e", d.b_e * norms)):
        naive.get_parameter(name).data = value.detach()
    naive.W_d.data = (d.W_d / norms[:, None]).detach()
    assert not torch.equal(naive.encode(x) > 0, d.encode(x) > 0)
    with pytest.raises(OptionError, match="train it with rows of norm 1"):
        d.normalised()
    d.W_d.data *= 3.0 / norms[:, None]
    unit = d.normalised()
    same(unit.W_d.norm(dim=1), torch.ones(9).double())
    same(unit.encode(x), 3 * d.encode(x))
    same(unit(x), d(x))
    # Rows of nearly one length: the latent that is larger by less than that is still kept.
    close = close_pair()
    assert close.encode(torch.ones(1).double()).tolist() == [1.0, 0.0]
    assert (close.normalised().encode(torch.ones(1).double()) > 0).tolist() == [True, False]


@pytest.mark.parametrize(("kind", "form"), EACH)
def test_scales_of_training_fold(kind: str, form: str) -> None:
    """What was trained on scaled inputs and targets works on them as they are."""
    d, x = oracles.random_dictionary(kind, form), oracles.inputs()
    out = 0.7 if d.transcoder else 2.5
    folded = d.rescaled(2.5, 0.7 if d.transcoder else None)
    same(folded.encode(x), d.encode(2.5 * x))
    same(folded(x), d(2.5 * x) / out)
    with pytest.raises(OptionError, match="give target_scale for a transcoder"):
        d.rescaled(2.5, None if d.transcoder else 0.7)
    with pytest.raises(OptionError, match="must be positive"):
        d.rescaled(-1.0, 1.0 if d.transcoder else None)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"b_e": torch.zeros(3)}, r"b_e has shape \[3\]; give \[4\]"),
        ({"w_d": torch.zeros(5, 2)}, r"W_d has shape \[5, 2\]; give \[4, 2\]"),
        ({"w_e": torch.zeros(2)}, r"give \[d_in, n\] and \[n, d_out\]"),
        ({"threshold": torch.zeros(1)}, r"threshold has shape \[1\]"),
        ({"k": 0}, "k is 0; give 1 to 4"),
        ({"k": 5}, "k is 5; give 1 to 4"),
        ({"k": 1, "threshold": torch.zeros(4)}, "at most one of k, threshold"),
        ({"r_mag": torch.zeros(4)}, "r_mag and b_mag go together"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0; give a positive one"),
        ({"w_skip": torch.zeros(2, 2)}, "is a transcoder; give transcoder=True"),
        ({"w_d": torch.zeros(4, 3), "b_d": torch.zeros(3)}, "is a transcoder"),
        ({"info": DictionaryInfo(target="mlp_out.0")}, "is a transcoder"),
        ({"transcoder": True, "apply_b_dec_to_input": True}, "give apply_b_dec_to_input=False"),
    ],
)
def test_what_does_not_go_together_is_refused(changed: dict[str, Any], says: str) -> None:
    """The message names the parameter, what it is, and what it should be."""
    fitting: dict[str, Any] = {"w_e": torch.zeros(2, 4), "b_e": torch.zeros(4)}
    fitting |= {"w_d": torch.zeros(4, 2), "b_d": torch.zeros(2), "apply_b_dec_to_input": False}
    Dictionary(**fitting)
    with pytest.raises(OptionError, match=says):
        Dictionary(**(fitting | changed))
    with pytest.raises(NumericsError, match="b_d of the dictionary holds NaN or infinity"):
        Dictionary(**(fitting | {"b_d": torch.tensor([0.0, torch.nan])}))


def test_another_width_is_refused() -> None:
    """An activation of another site is not read in silence."""
    with pytest.raises(SiteError, match=r"reads 5 numbers, and x has shape \[4, 6, 3\]"):
        oracles.random_dictionary()(oracles.inputs(3))


def test_it_says_what_it_is() -> None:
    """Its text has nonlinearity, form, sites and sizes."""
    info = DictionaryInfo(site="mlp_in.1", target="mlp_out.1")
    d = oracles.random_dictionary("topk", "skip", info=info)
    assert repr(d) == "Dictionary(topk 3 skip transcoder of mlp_in.1 to mlp_out.1, 5 -> 9 -> 7)"
