"""The parameters of a dictionary: their names, their shapes, and what goes together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from circuitlab.errors import NumericsError, OptionError

if TYPE_CHECKING:
    from circuitlab.dictionaries.dictionary import Dictionary

#: Names of the parameters, in the order in which they are given.
PARAMETERS = ("W_e", "b_e", "W_d", "b_d", "threshold", "r_mag", "b_mag", "W_skip")


def parameter_shapes(d_in: int, n: int, d_out: int) -> dict[str, list[int]]:
    """Shape of each parameter, by name."""
    maps = {"W_e": [d_in, n], "W_d": [n, d_out], "b_d": [d_out], "W_skip": [d_in, d_out]}
    return maps | {name: [n] for name in ("b_e", "threshold", "r_mag", "b_mag")}


def check_parameters(dictionary: Dictionary) -> None:
    """Refuse parameters and options that do not fit together.

    Raises:
        OptionError: what does not fit is named.
        NumericsError: a parameter is not finite.
    """
    d = dictionary
    if d.W_e.ndim != 2 or d.W_d.ndim != 2:
        raise OptionError("W_e and W_d must be matrices; give [d_in, n] and [n, d_out]")
    for name, shape in parameter_shapes(d.d_in, d.n, d.d_out).items():
        tensor = getattr(d, name)
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise OptionError(f"{name} has shape {list(tensor.shape)}; give {shape}")
        if not torch.isfinite(tensor).all():
            raise NumericsError(f"{name} of the dictionary holds NaN or infinity; give another")
    if sum(extra is not None for extra in (d.k, d.threshold, d.r_mag)) > 1:
        raise OptionError("give at most one of k, threshold, and r_mag with b_mag")
    if (d.r_mag is None) != (d.b_mag is None):
        raise OptionError("r_mag and b_mag go together: give both or neither")
    if d.k is not None and not 1 <= d.k <= d.n:
        raise OptionError(f"k is {d.k}; give 1 to {d.n}, the number of latents")
    if not (d.bandwidth > 0 and math.isfinite(d.bandwidth)):
        raise OptionError(f"bandwidth is {d.bandwidth}; give a positive one")
    if d.transcoder and d.apply_b_dec_to_input:
        raise OptionError(
            "b_d of a transcoder is at home at another site than its input; "
            "give apply_b_dec_to_input=False"
        )
    other = d.d_in != d.d_out or d.W_skip is not None or d.info.target is not None
    if other and not d.transcoder:
        raise OptionError(
            "a dictionary with another output width, a skip or a target is a transcoder; "
            "give transcoder=True"
        )
