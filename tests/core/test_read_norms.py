"""Norms read by trying them: gains bit for bit, scales by their formulas, and what is no norm."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

from circuitlab import ModelError, load_model
from circuitlab.norms import read_norm


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


class PlusOne(nn.Module):
    """An RMSNorm whose gain is its parameter and one more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()) * (1 + self.weight)


class Clipped(nn.LayerNorm):
    """A LayerNorm that is none for large values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class Mixed(nn.Module):
    """A norm that mixes coordinates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:]) @ self.weight


@pytest.mark.parametrize("name", ["LayerNorm", "no bias", "RMSNorm", "plus one", "Identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gains_are_read_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Trying a norm rounds; what is read is the parameter itself, one of them negative."""
    torch.manual_seed(0)
    norm, more, centred = {
        "LayerNorm": (nn.LayerNorm(24), 0, True),
        "no bias": (nn.LayerNorm(24, bias=False), 0, True),
        "RMSNorm": (nn.RMSNorm(24), 0, False),
        "plus one": (PlusOne(24), 1, False),
        "Identity": (nn.Identity(), 0, False),
    }[name]
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(24) / 3)
    norm = norm.to(dtype)
    read = read_norm(norm, 24)
    weight = getattr(norm, "weight", torch.ones(24))
    shift = getattr(norm, "bias", None)
    assert torch.equal(read.gain, weight.detach().double() + more)
    assert torch.equal(read.shift, torch.zeros(24).double() if shift is None else shift.double())
    assert read.centred == centred
    assert read.scaled == (name != "Identity")


@pytest.mark.parametrize("norm", [nn.LayerNorm(24, eps=1e-5), nn.RMSNorm(24, eps=1e-6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_are_those_of_the_formula(norm: Any, dtype: torch.dtype) -> None:
    """In the type of the stream, whatever the norm's own; of nothing, what the norm adds to it."""
    nn.init.normal_(norm.weight, 0.0, 1.0, generator=torch.Generator().manual_seed(0))
    read = read_norm(norm, 24)
    stream = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).to(dtype) + 1
    stream[3] = 0
    mean = stream.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else 0
    expected = ((stream - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt()
    found = read.scale(norm, stream)
    assert found.dtype == dtype
    assert apart(found, expected) < 100 * torch.finfo(dtype).eps
    assert float(found[3]) == pytest.approx(norm.eps**0.5, rel=1e-5)
    assert norm.weight.dtype == torch.float32


@pytest.mark.parametrize("norm", [Clipped(24), Mixed(24), nn.Tanh()])
def test_what_is_no_norm_is_refused(norm: nn.Module) -> None:
    """It cannot be folded into weights; the message names its class."""
    name = type(norm).__name__
    with pytest.raises(ModelError, match=f"norm of class {name} is neither a LayerNorm, an RMS"):
        read_norm(norm, 24)


def test_a_model_with_such_a_norm_is_refused() -> None:
    """Folding says so, of the layer it is asked for and of those whose norms it must know."""
    module: Any = oracles.random_gpt2()
    module.transformer.h[1].ln_1 = Clipped(16).double()
    model = load_model((module, None))
    for layer in (0, 1):
        with pytest.raises(ModelError, match="class Clipped is neither"):
            model.weights.folded(layer)
