"""Dictionary: a sparse autoencoder or transcoder, as a module that can be used and trained."""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from circuitlab.dictionaries.fitting import check_fit
from circuitlab.dictionaries.info import DictionaryInfo
from circuitlab.dictionaries.nonlinear import gated, jump_relu, step_sum, top_k
from circuitlab.dictionaries.parameters import PARAMETERS, check_parameters
from circuitlab.errors import OptionError, SiteError

if TYPE_CHECKING:
    from circuitlab.model import TracedModel

Nonlinearity = Literal["relu", "topk", "jumprelu", "gated"]

#: Numbers of pre-activations that :meth:`Dictionary.active` holds at once.
_BLOCK = 1 << 24
#: Decoder rows whose norms agree to this part are of one length.
_EQUAL = 1e-5


class Dictionary(nn.Module):
    """A sparse autoencoder, or a transcoder, which writes another site than it reads.

    Row vectors: ``pre = x @ W_e + b_e``, with ``x - b_d`` for ``x`` if ``apply_b_dec_to_input``;
    ``z`` from ``pre`` by the nonlinearity; ``x_hat = z @ W_d + b_d``, plus ``x @ W_skip`` for a
    skip transcoder. The nonlinearity follows from what is given:

    * nothing: ``relu``. ``z = max(pre, 0)``.
    * ``k``: ``topk``, Gao et al. 2024 (arXiv:2406.04093). The ``k`` largest of ``pre``, those above
      0 among them.
    * ``threshold``: ``jumprelu``, Rajamanoharan et al. 2024 (arXiv:2407.14435). ``z = pre`` where
      it exceeds the threshold, else 0. A negative threshold counts as 0. Its gradient is their
      straight-through estimator, of width ``bandwidth``, which reaches only thresholds above 0.
    * ``r_mag`` and ``b_mag``: ``gated``, Rajamanoharan et al. 2024 (arXiv:2404.16014). ``b_e`` is
      the gate's bias; where ``pre > 0``, ``z = max((x @ W_e) * exp(r_mag) + b_mag, 0)``. The gate
      passes no gradient.

    Parameters are copies, in the widest type among those given and at least float32; inputs are
    cast to it. ``z`` is never negative, and not 0 where a latent is active.

    Args:
        w_e: Encoder, ``[d_in, n]``.
        b_e: Its bias, ``[n]``.
        w_d: Decoder, ``[n, d_out]``; row ``i`` is what latent ``i`` writes.
        b_d: Its bias, ``[d_out]``.
        apply_b_dec_to_input: Whether ``b_d`` is subtracted from the input. Code bases differ; see
            :meth:`converted`.
        k: Most latents that are active at a token.
        threshold: ``[n]``.
        r_mag: Logarithm of the magnitudes' scale, ``[n]``.
        b_mag: Bias of the magnitudes, ``[n]``.
        w_skip: ``[d_in, d_out]``, of a transcoder.
        transcoder: Whether it writes another site than it reads.
        bandwidth: Width of the estimator's window, in units of ``pre``.
        info: What it was trained on.

    Attributes:
        W_e, b_e, W_d, b_d, threshold, r_mag, b_mag, W_skip: Parameters; None where not given.

    Raises:
        OptionError: shapes or options that do not fit together.
        NumericsError: a parameter is not finite.
    """

    W_e: Tensor
    b_e: Tensor
    W_d: Tensor
    b_d: Tensor
    threshold: Tensor | None
    r_mag: Tensor | None
    b_mag: Tensor | None
    W_skip: Tensor | None

    def __init__(
        self,
        w_e: Tensor,
        b_e: Tensor,
        w_d: Tensor,
        b_d: Tensor,
        *,
        apply_b_dec_to_input: bool,
        k: int | None = None,
        threshold: Tensor | None = None,
        r_mag: Tensor | None = None,
        b_mag: Tensor | None = None,
        w_skip: Tensor | None = None,
        transcoder: bool = False,
        bandwidth: float = 0.001,
        info: DictionaryInfo | None = None,
    ) -> None:
        super().__init__()
        given = (w_e, b_e, w_d, b_d, threshold, r_mag, b_mag, w_skip)
        types = [tensor.dtype for tensor in given if tensor is not None]
        dtype = reduce(torch.promote_types, types, torch.float32)
        for name, tensor in zip(PARAMETERS, given, strict=True):
            copy = None if tensor is None else nn.Parameter(tensor.detach().to(dtype, copy=True))
            self.register_parameter(name, copy)
        self.k, self.bandwidth, self.transcoder = k, float(bandwidth), transcoder
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.info = info or DictionaryInfo()
        check_parameters(self)

    def __repr__(self) -> str:
        kind = "transcoder" if self.transcoder else "autoencoder"
        kind = f"skip {kind}" if self.W_skip is not None else kind
        k = f" {self.k}" if self.k is not None else ""
        where = f" of {self.info.site}" if self.info.site else ""
        where += f" to {self.info.target}" if self.info.target else ""
        sizes = f"{self.d_in} -> {self.n} -> {self.d_out}"
        return f"Dictionary({self.nonlinearity}{k} {kind}{where}, {sizes})"

    @property
    def nonlinearity(self) -> Nonlinearity:
        """``relu``, ``topk``, ``jumprelu`` or ``gated``."""
        if self.k is not None:
            return "topk"
        if self.threshold is not None:
            return "jumprelu"
        return "relu" if self.r_mag is None else "gated"

    @property
    def d_in(self) -> int:
        """Width of what it reads."""
        return self.W_e.shape[0]

    @property
    def n(self) -> int:
        """Number of latents."""
        return self.W_e.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.W_d.shape[1]

    # --- what it computes -------------------------------------------------------------------------

    def pre(self, x: Tensor) -> Tensor:
        """Pre-activations, ``[..., n]``; for ``gated`` the gate's, which decide what is active.

        Args:
            x: ``[..., d_in]``. All heads of ``z``, ``q``, ``k`` or ``v`` stand side by side.

        Raises:
            SiteError: ``x`` has another width.
        """
        x = self._input(x)
        if self.apply_b_dec_to_input:
            x = x - self.b_d
        return functional.linear(x, self.W_e.T, self.b_e)

    def activate(self, pre: Tensor) -> Tensor:
        """Latents ``z`` of pre-activations, both ``[..., n]``."""
        if self.k is not None:
            return top_k(pre, self.k)
        if self.threshold is not None:
            return jump_relu(pre, self.threshold, self.bandwidth)
        if self.r_mag is not None and self.b_mag is not None:
            return gated(pre, self.b_e, self.r_mag, self.b_mag)
        return pre.relu()

    def encode(self, x: Tensor) -> Tensor:
        """Latents ``z``, ``[..., n]``, of ``x`` ``[..., d_in]``."""
        return self.activate(self.pre(x))

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction ``[..., d_out]`` of latents ``z`` ``[..., n]``.

        Args:
            z: Latents.
            x: What was read, for a skip transcoder.

        Raises:
            OptionError: a skip transcoder is not given ``x``.
        """
        written = functional.linear(z.to(self.W_d.dtype), self.W_d.T, self.b_d)
        return self._with_skip(written, x)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction ``[..., d_out]`` from what is read, ``[..., d_in]``."""
        return self.decode(self.encode(x), x)

    def error(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """What the reconstruction misses, ``target - x_hat``, ``[..., d_out]``.

        Args:
            x: What is read.
            target: What it should give; an autoencoder's is ``x``.

        Raises:
            OptionError: a transcoder is not given its target.
        """
        if target is None:
            if self.transcoder:
                raise OptionError("a transcoder's error is to its target; give error(x, target)")
            target = x
        missed: Tensor = target.to(self.W_d.dtype) - self(x)
        return missed

    def active(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The active latents, without keeping the others.

        Only a block of tokens has all its pre-activations in memory at once.

        Returns:
            Indices and values, ``[..., m]``, in no order. ``m`` is ``k`` for ``topk``, else the
            most that are active at one token, at least 1. A value of 0 fills up: not active.
        """
        flat = self._input(x).reshape(-1, self.d_in)
        parts = [self._largest(block) for block in torch.split(flat, max(1, _BLOCK // self.n))]
        m = max(values.shape[1] for _, values in parts)
        both = (
            torch.cat([functional.pad(part[i], (0, m - part[i].shape[1])) for part in parts])
            for i in (0, 1)
        )
        indices, values = (tensor.view(*x.shape[:-1], m) for tensor in both)
        return indices, values

    def decode_active(self, indices: Tensor, values: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction ``[..., d_out]`` of what :meth:`active` gives; like :meth:`decode`."""
        m = indices.shape[-1]
        flat = functional.embedding_bag(
            indices.reshape(-1, m), self.W_d, per_sample_weights=values.reshape(-1, m), mode="sum"
        )
        return self._with_skip(flat.view(*indices.shape[:-1], self.d_out) + self.b_d, x)

    def l0(self, pre: Tensor) -> Tensor:
        """Number of active latents, ``[...]``, from pre-activations ``[..., n]``.

        For ``jumprelu`` its gradient in the threshold is the straight-through estimator's, the
        penalty that Rajamanoharan et al. 2024 (arXiv:2407.14435) train with; else it has none.
        """
        if self.threshold is not None:
            return step_sum(pre, self.threshold, self.bandwidth)
        return (self.activate(pre) > 0).to(pre.dtype).sum(-1)

    # --- the same function, written otherwise -----------------------------------------------------

    @torch.no_grad()
    def converted(self, *, apply_b_dec_to_input: bool) -> Dictionary:
        """The same function in the other convention: ``b_d @ W_e`` goes into the encoder's biases.

        Raises:
            OptionError: a transcoder cannot apply its ``b_d`` to the input.
        """
        if self.transcoder or apply_b_dec_to_input == self.apply_b_dec_to_input:
            return self._like({}, apply_b_dec_to_input=apply_b_dec_to_input)
        sign = 1 if self.apply_b_dec_to_input else -1
        moved = sign * (self.b_d.double() @ self.W_e.double())
        changed = {"b_e": self.b_e.double() - moved}
        if self.r_mag is not None and self.b_mag is not None:
            changed["b_mag"] = self.b_mag.double() - moved * self.r_mag.double().exp()
        return self._like(changed, apply_b_dec_to_input=apply_b_dec_to_input)

    @torch.no_grad()
    def normalised(self) -> Dictionary:
        """The same function with decoder rows of norm 1; rows of 0 stay.

        Latents, their biases and thresholds are scaled by the rows' norms. ``topk`` compares
        latents before that, so unequal scales would change which of them it keeps. The window of
        ``jumprelu``'s estimator stays as it is.

        Raises:
            OptionError: a ``topk`` dictionary has decoder rows of different norms.
        """
        norms = self.W_d.double().norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        if self.k is not None:
            if float(norms.max() - norms.min()) > _EQUAL * float(norms.max()):
                raise OptionError(
                    "decoder rows of a topk dictionary differ in norm, and rescaling them would "
                    "change which latents are kept; train it with rows of norm 1"
                )
            norms = norms.mean().expand_as(norms)
        scaled = {"W_e": self.W_e * norms, "W_d": self.W_d / norms[:, None]}
        for name in ("b_e", "threshold", "b_mag"):
            if (tensor := getattr(self, name)) is not None:
                scaled[name] = tensor * norms
        return self._like(scaled)

    @torch.no_grad()
    def rescaled(self, scale: float, target_scale: float | None = None) -> Dictionary:
        """The dictionary of ``x``, from this one, which was trained on ``scale * x``.

        Latents stay what they are: the scale goes into encoder and decoder.

        Args:
            scale: What the inputs were multiplied by in training.
            target_scale: What a transcoder's targets were multiplied by.

        Raises:
            OptionError: a scale is not positive, or a transcoder's second is missing.
        """
        if self.transcoder != (target_scale is not None):
            raise OptionError("give target_scale for a transcoder, and for nothing else")
        out = scale if target_scale is None else target_scale
        if not all(value > 0 and math.isfinite(value) for value in (scale, out)):
            raise OptionError(f"scales {scale} and {out} must be positive and finite")
        changed = {"W_e": self.W_e * scale, "W_d": self.W_d / out, "b_d": self.b_d / out}
        if self.W_skip is not None:
            changed["W_skip"] = self.W_skip * (scale / out)
        return self._like(changed)

    # --- where it belongs -------------------------------------------------------------------------

    def check_for(self, model: TracedModel, use: DictionaryInfo | None = None) -> list[str]:
        """Check that this dictionary fits a model, and say how its training differs from its use.

        Args:
            model: The model it is to read.
            use: What it is to be used on; what this leaves out is not compared.

        Returns:
            Warnings: another model, longer prompts, other data, padding or beginnings, or a model
            whose weights were changed for training.

        Raises:
            SiteError: it does not say what it reads, the model has no such site, or one of another
                width.
        """
        return check_fit(self, model, use)

    # --- parts ------------------------------------------------------------------------------------

    def _input(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise SiteError(
                f"the dictionary reads {self.d_in} numbers, and x has shape {list(x.shape)}; give "
                f"[..., {self.d_in}], all heads side by side"
            )
        return x.to(self.W_e.dtype)

    def _with_skip(self, written: Tensor, x: Tensor | None) -> Tensor:
        if self.W_skip is None:
            return written
        if x is None:
            raise OptionError("a skip transcoder writes x @ W_skip too; give decode(z, x)")
        return written + self._input(x) @ self.W_skip

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and values ``[tokens, m]`` of all active latents of a block of tokens."""
        if self.k is not None:
            values, indices = self.pre(x).topk(self.k, -1, sorted=False)
            return indices, values.relu()
        z = self.encode(x)
        m = int((z > 0).sum(-1).max()) if len(x) else 1
        values, indices = z.topk(max(m, 1), -1, sorted=False)
        return indices, values

    def _like(self, changed: dict[str, Tensor], **options: Any) -> Dictionary:
        """This dictionary with some parameters and options changed."""
        given: dict[str, Any] = {
            name.lower(): None if own is None else changed.get(name, own).to(own.dtype)
            for name in PARAMETERS
            for own in [getattr(self, name)]
        }
        kept = ("k", "transcoder", "bandwidth", "info", "apply_b_dec_to_input")
        settings = {name: getattr(self, name) for name in kept} | options
        return Dictionary(**given, **settings)
