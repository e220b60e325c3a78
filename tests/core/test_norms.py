"""Gradients carried back through a norm equal autograd through norm and projection."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from circuitlab.norms import Readers, pull_back

RUNS, READERS, TOKENS, WIDTH, D_HEAD = 3, 5, 7, 12, 4


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


@dataclass
class Case:
    """A norm, projections that read through it, and gradients at what they give, in float64."""

    norm: nn.Module
    weight: Tensor
    bias: Tensor
    streams: Tensor
    gradients: Tensor

    @classmethod
    def of(cls, name: str, *, learning: bool = False) -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            norm = NORMS[name]().requires_grad_(learning)
            for parameter in norm.parameters():
                nn.init.normal_(parameter, 1.0, 0.5)
            shapes = [
                *[(READERS, WIDTH, D_HEAD), (READERS, D_HEAD)],
                *[(RUNS, TOKENS, WIDTH), (RUNS, READERS, TOKENS, D_HEAD)],
            ]
            weight, bias, streams, gradients = (
                torch.randn(shape, dtype=torch.float64) for shape in shapes
            )
        return cls(norm.double(), weight, bias, 3 * streams + 1, gradients)

    def projected(self, streams: Tensor) -> Tensor:
        """What each reader's projection gives, ``[..., readers, tokens, d_head]``."""
        return self.norm(streams)[..., None, :, :] @ self.weight + self.bias[:, None]

    def pull_back(self, dtype: torch.dtype = torch.float64) -> Tensor:
        with torch.no_grad():
            values = self.projected(self.streams)
            shift = getattr(self.norm, "bias", None)
            at_shift = self.bias if shift is None else self.bias + shift @ self.weight
        readers = Readers(self.norm.to(dtype), self.weight.to(dtype), at_shift.to(dtype))
        found = pull_back(
            readers, self.streams.to(dtype), values.to(dtype), self.gradients.to(dtype)
        )
        self.norm.double()
        return found

    def expected(self) -> Tensor:
        """The same by autograd: one reader of one run at a time."""
        total = torch.zeros(READERS, TOKENS, WIDTH, dtype=torch.float64)
        for stream, gradient in zip(self.streams, self.gradients, strict=True):
            at = stream.clone().requires_grad_(True)
            values = self.projected(at)
            for reader in range(READERS):
                (own,) = torch.autograd.grad(
                    values[reader], at, gradient[reader], retain_graph=True
                )
                total[reader] += own / RUNS
        return total


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("learning", [True, False])
def test_pull_back_is_autograd(
    name: str, dtype: torch.dtype, tolerance: float, learning: bool
) -> None:
    """Each reader's gradient is autograd's, mean over runs; no parameter collects one."""
    case = Case.of(name, learning=learning)
    found, expected = case.pull_back(dtype), case.expected()
    assert found.dtype == dtype
    assert not found.requires_grad
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())
    assert all(parameter.grad is None for parameter in case.norm.parameters())


def test_runs_are_averaged() -> None:
    """Several runs at once are the mean of each alone."""
    case = Case.of("LayerNorm")
    together = case.pull_back()
    streams, gradients = case.streams, case.gradients
    alone = []
    for run in range(RUNS):
        case.streams, case.gradients = streams[run : run + 1], gradients[run : run + 1]
        alone.append(case.pull_back())
    assert float((together - torch.stack(alone).mean(0)).abs().max()) < 1e-12


def test_shift_of_the_stream_has_no_gradient() -> None:
    """A LayerNorm sees neither its stream's mean nor its scale, so no gradient points there."""
    case = Case.of("LayerNorm")
    case.norm.eps = 0.0
    case.streams, case.gradients = case.streams[:1], case.gradients[:1]
    found = case.pull_back()
    assert float(found.sum(-1).abs().max()) < 1e-12
    assert float((found * case.streams[0]).sum(-1).abs().max()) < 1e-11
    assert float(found.abs().max()) > 1e-2
