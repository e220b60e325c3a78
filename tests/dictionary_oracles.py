"""Dictionaries to test with, and what they compute, written out in Python floats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from circuitlab.dictionaries import Dictionary

KINDS = ("relu", "topk", "jumprelu", "gated")
#: Whether it is a transcoder, has a skip, applies its decoder's bias to the input.
FORMS = {
    "plain": (False, False, False),
    "input bias": (False, False, True),
    "transcoder": (True, False, False),
    "skip": (True, True, False),
}


def random_dictionary(
    kind: str = "relu",
    form: str = "plain",
    *,
    d_in: int = 5,
    n: int = 9,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Dictionary:
    """A dictionary with no bias at 0 and decoder rows of all lengths; ``k`` is 3."""
    transcoder, skip, apply = FORMS[form]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    d_out = d_in + 2 if transcoder else d_in
    if kind == "topk":
        options.setdefault("k", 3)
    if kind == "jumprelu":
        options.setdefault("threshold", 0.2 + normal(n).abs())
    if kind == "gated":
        options |= {"r_mag": 0.5 * normal(n), "b_mag": normal(n)}
    if skip:
        options["w_skip"] = normal(d_in, d_out)
    return Dictionary(
        normal(d_in, n),
        normal(n),
        normal(n, d_out),
        normal(d_out),
        apply_b_dec_to_input=apply,
        transcoder=transcoder,
        **options,
    )


def inputs(d_in: int = 5, *, seed: int = 1) -> Tensor:
    """Activations ``[4, 6, d_in]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, d_in, generator=generator, dtype=torch.float64)


def by_loops(d: Dictionary, x: list[float]) -> tuple[list[float], list[float]]:
    """Latents and reconstruction of one activation, as the papers write them."""
    w_e, b_e, w_d, b_d = (t.tolist() for t in (d.W_e, d.b_e, d.W_d, d.b_d))
    shifted = [v - b for v, b in zip(x, b_d, strict=True)] if d.apply_b_dec_to_input else x
    linear = [sum(shifted[i] * w_e[i][j] for i in range(len(x))) for j in range(len(b_e))]
    pre = [value + bias for value, bias in zip(linear, b_e, strict=True)]
    z = [0.0] * len(pre)
    theta, scale, bias = (
        None if t is None else t.tolist() for t in (d.threshold, d.r_mag, d.b_mag)
    )
    best = sorted(range(len(pre)), key=lambda j: -pre[j])[: d.k]
    for j, value in enumerate(pre):
        if theta:
            z[j] = value if value > max(theta[j], 0.0) else 0.0
        elif scale and bias:
            magnitude = linear[j] * math.exp(scale[j]) + bias[j]
            z[j] = max(magnitude, 0.0) if value > 0 else 0.0
        elif j in best:
            z[j] = max(value, 0.0)
    written = [b_d[o] + sum(z[j] * w_d[j][o] for j in range(len(z))) for o in range(len(b_d))]
    if d.W_skip is not None:
        skip = d.W_skip.tolist()
        written = [w + sum(x[i] * skip[i][o] for i in range(len(x))) for o, w in enumerate(written)]
    return z, written


def all_by_loops(d: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`by_loops` of every activation ``[..., d_in]``, float64."""
    pairs = [by_loops(d, row) for row in x.reshape(-1, x.shape[-1]).tolist()]
    latents, written = (torch.tensor([p[i] for p in pairs], dtype=torch.float64) for i in (0, 1))
    return latents.view(*x.shape[:-1], -1), written.view(*x.shape[:-1], -1)
