"""Gradients carried back through a norm equal autograd through the norm itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from circuitlab.norms import pull_back

READERS, TOKENS, WIDTH = 5, 7, 12


class MeanSquareNorm(nn.Module):
    """A norm of another kind, as Llama has: no mean is taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


class Subclassed(nn.LayerNorm):
    """A LayerNorm that does something more; the closed form would be wrong for it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "no affine": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "no bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "wide eps": lambda: nn.LayerNorm(WIDTH, eps=0.3),
    "subclass": lambda: Subclassed(WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "own": MeanSquareNorm,
    "Identity": nn.Identity,
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("learning", [True, False])
def test_pull_back_is_autograd(
    name: str, dtype: torch.dtype, tolerance: float, learning: bool
) -> None:
    """Every reader's product is autograd's, and no parameter collects a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm = NORMS[name]()
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.5)
        stream = 3 * torch.randn(TOKENS, WIDTH, dtype=torch.float64) + 1
        gradient = torch.randn(READERS, TOKENS, WIDTH, dtype=torch.float64)
    norm = norm.to(dtype).requires_grad_(learning)
    found = pull_back(norm, stream.to(dtype), gradient.to(dtype))
    at = stream.clone().requires_grad_(True)
    result = norm.double()(at)
    expected = torch.stack(
        [torch.autograd.grad(result, at, row, retain_graph=True)[0] for row in gradient]
    )
    assert found.dtype == dtype
    assert not found.requires_grad
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())
    assert all(parameter.grad is None for parameter in norm.parameters())


def test_float32_gradient_through_a_half_precision_norm() -> None:
    """A bfloat16 norm is differentiated in float32: its rounded weights, no rounding after."""
    norm = nn.LayerNorm(WIDTH).to(torch.bfloat16)
    stream = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    gradient = torch.ones(2, TOKENS, WIDTH) * torch.arange(WIDTH)
    found = pull_back(norm, stream, gradient)
    expected = pull_back(norm.float(), stream, gradient)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_shift_of_the_stream_has_no_gradient() -> None:
    """A LayerNorm sees neither its stream's mean nor its scale, so no gradient points there."""
    stream = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    gradient = torch.randn(READERS, TOKENS, WIDTH, dtype=torch.float64)
    norm = nn.LayerNorm(WIDTH, eps=0.0).double()
    found = pull_back(norm, stream, gradient)
    assert float(found.sum(-1).abs().max()) < 1e-12
    assert float((found * stream).sum(-1).abs().max()) < 1e-12
