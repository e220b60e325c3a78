"""Weights: a model's weights by head and by reader, whichever way its family stores them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitlab.errors import ModelError, SiteError
from circuitlab.folded import HeadWeights, MlpWeights
from circuitlab.norms import Norm, Readers, read_norm
from circuitlab.plans import Locator
from circuitlab.sites import Site
from circuitlab.wiring import PORTS

#: Columns of a reader handed out at once: an unembedding in float64 would take gigabytes.
_COLUMNS = 8192


class Weights:
    """A model's weights by head and by reader, found where its architecture says they are.

    Made by :class:`circuitlab.TracedModel` as its ``weights``. Linear maps are given for row
    vectors, ``x @ W``.
    """

    def __init__(self, module: nn.Module, locator: Locator) -> None:
        self._module = module
        self._locator = locator
        self._architecture = locator.architecture

    def heads(self, layer: int, which: str) -> Tensor:
        """Weights of all heads of a layer, not folded.

        Returns:
            ``[n_heads, d_model, d_head]`` for q; with ``n_kv_heads`` in front for k and v;
            ``[n_heads, d_head, d_model]`` for o. A view of the model's own weights: do not change
            it.

        Raises:
            SiteError: the layer does not exist.
        """
        site = Site("z" if which == "o" else which, layer)
        self._locator.check(site)
        a = self._architecture
        if which == "o":
            weight = _input_by_output(self._in_block(layer, a.output_projection))
            return weight.view(a.n_heads, a.d_head, -1)
        weight = _input_by_output(self._in_block(layer, a.projection(which).path))
        columns, step = self._locator.columns(site, 0), a.projection(which).stride
        n_heads = a.n_heads_of(which)
        part = weight[:, columns.start : columns.start + (n_heads - 1) * step + a.d_head]
        return part.unfold(-1, a.d_head, step).transpose(0, 1)

    @torch.no_grad()
    def folded(self, layer: int, dtype: torch.dtype = torch.float32) -> HeadWeights:
        """All heads of a layer, their norm folded in; see :class:`HeadWeights`.

        Raises:
            SiteError: the layer does not exist.
            ModelError: its norm is neither a LayerNorm, an RMSNorm nor an identity.
        """
        a = self._architecture
        norm = self._norm(layer)
        ports: list[Tensor] = []
        biases: list[Tensor] = []
        for port in PORTS:
            weight, bias = self.heads(layer, port).double(), self._head_bias(Site(port, layer))
            shifted = norm.shift @ weight
            group = a.n_heads // len(weight)
            ports.append(norm.fold(weight).to(dtype).repeat_interleave(group, 0))
            both = shifted if bias is None else shifted + bias.double()
            biases.append(both.to(dtype).repeat_interleave(group, 0))
        output = self._centred(self.heads(layer, "o").double()).to(dtype)
        q, k, v = ports
        q_bias, k_bias, v_bias = biases
        return HeadWeights(q, k, v, output, q_bias, k_bias, v_bias, a.score_scale(layer))

    @cached_property
    def centres(self) -> bool:
        """Whether every norm takes the mean off, so that nothing sees a vector's mean."""
        a = self._architecture
        norms = [self._norm_module(None)]
        for layer in range(a.n_layers):
            norms += [self._in_block(layer, path) for path in (a.attention_norm, a.mlp_norm)]
        return all(read_norm(norm, a.d_model).centred for norm in norms)

    @torch.no_grad()
    def mlp(self, layer: int, dtype: torch.dtype = torch.float32) -> MlpWeights:
        """The MLP of a layer, its norm folded in; see :class:`MlpWeights`.

        Raises:
            SiteError: the layer does not exist, or the architecture does not name the MLP's maps
                and its nonlinearity.
            ModelError: its norm is neither a LayerNorm, an RMSNorm nor an identity.
        """
        self._locator.check(Site("mlp_post", layer))
        a = self._architecture
        if not (a.mlp_input_projection and a.mlp_activation):
            raise SiteError(
                f"the architecture of {a.family} does not say what the MLP's hidden layer is: set "
                f"mlp_input_projection and mlp_activation, if it is one map and a nonlinearity, "
                f"and mlp_gate_projection where a gate multiplies it"
            )
        norm = read_norm(self._in_block(layer, a.mlp_norm), a.d_model)

        def folded(path: str) -> tuple[Tensor, Tensor]:
            module = self._in_block(layer, path)
            weight = _input_by_output(module).double()
            bias = norm.shift @ weight + _bias(module).double()
            return norm.fold(weight).to(dtype), bias.to(dtype)

        last = self._in_block(layer, a.mlp_output_projection)
        return MlpWeights(
            *folded(a.mlp_input_projection),
            self._in_block(layer, a.mlp_activation),
            _input_by_output(last).to(dtype),
            _bias(last).to(dtype),
            *(folded(a.mlp_gate_projection) if a.mlp_gate_projection else ()),
        )

    @torch.no_grad()
    def embedding(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What each token puts into the residual stream, ``[vocab, d_model]``; not centred."""
        weight: Any = self._module.get_submodule(self._architecture.embed).weight
        return weight.detach().to(dtype)  # type: ignore[no-any-return]  # nn.Module's attribute

    @torch.no_grad()
    def positions(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """What each position adds to the stream, ``[n_positions, d_model]``; None where nothing."""
        path = self._architecture.position_embed
        if not path:
            return None
        weight: Any = self._module.get_submodule(path).weight
        return weight.detach().to(dtype)  # type: ignore[no-any-return]  # nn.Module's attribute

    @torch.no_grad()
    def unembedding(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """From the last residual stream ``x`` to logits, the final norm folded in.

        Returns:
            ``[d_model, vocab]`` and ``[vocab]``: logits are ``x / σ @ weight + bias`` with ``σ`` of
            ``norm_scale(None, x)``.

        Raises:
            ModelError: the norm is neither a LayerNorm, an RMSNorm nor an identity.
        """
        norm, module = self._norm(None), self._module.get_submodule(self._architecture.unembedding)
        weight, own = _input_by_output(module).to(dtype), getattr(module, "bias", None)
        bias = norm.shift.to(dtype) @ weight
        return norm.fold(weight), bias if own is None else bias + own.detach().to(dtype)

    @torch.no_grad()
    def norm_scale(self, layer: int | None, stream: Tensor) -> Tensor:
        """What a norm divides a residual stream by, ``[..., 1]``; 1 where there is no norm.

        Args:
            layer: Whose attention's norm; None for the final norm.
            stream: ``[..., d_model]``.
        """
        return self._norm(layer).scale(self._norm_module(layer), stream)

    @torch.no_grad()
    def rotations(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """How rotary embeddings turn queries and keys, ``[n, d_head, d_head]``, one per position.

        A row vector ``q`` at a position becomes ``q @ R``; ``R_i @ R_j^T`` depends on ``i - j``
        alone. None for a model without them.
        """
        a = self._architecture
        if not a.rotary:
            return None
        module = self._module.get_submodule(a.rotary)
        like = torch.zeros(1, dtype=torch.float64, device=positions.device)
        cos, sin = (part[0].to(dtype) for part in module(like, positions[None]))
        width = cos.shape[-1]
        turn = torch.eye(a.d_head, dtype=dtype, device=cos.device).repeat(len(cos), 1, 1)
        unit = torch.eye(width, dtype=dtype, device=cos.device)
        half = torch.cat([-unit[:, width // 2 :], unit[:, : width // 2]], -1)
        turn[:, :width, :width] = unit * cos[:, None] + half * sin[:, None]
        return turn

    def attention_bias(self, layer: int) -> Tensor:
        """What a layer's attention adds beside its heads, ``[d_model]``; the same for every prompt.

        Raises:
            SiteError: the layer does not exist.
        """
        self._locator.check(Site("attn_out", layer))
        return _bias(self._in_block(layer, self._architecture.output_projection))

    @torch.no_grad()
    def projected(self, site: Site, stream: Tensor, *, per_head: bool = False) -> Tensor:
        """The q, k or v that a layer would compute from another residual stream.

        Args:
            site: A whole ``q``, ``k`` or ``v``.
            stream: ``[..., batch, pos, d_model]``; the layer's norm is applied to it here.
            per_head: Whether each head has a stream of its own: ``[..., n_heads, batch, pos,
                d_model]``.

        Returns:
            ``[..., batch, pos, n_heads, d_head]``; of k and v ``n_kv_heads`` where they are shared.

        Raises:
            SiteError: the site is of another kind or does not exist.
            ModelError: ``per_head``, and heads share keys and values.
        """
        if site.kind not in PORTS or site.layer is None:
            raise SiteError(f"site {site} is not a projection; give q, k or v of a layer")
        self._locator.check(site)
        if per_head:
            self._refuse_shared("streams of their own for single heads")
        a = self._architecture
        norm = self._in_block(site.layer, a.attention_norm)
        weight, bias = self.heads(site.layer, site.kind), self._head_bias(site)
        if per_head:
            value = torch.einsum("...hbpd,hde->...bphe", norm(stream), weight)
        else:
            # Side by side as they are stored, and without the other ports of a joint projection.
            joined = weight.transpose(0, 1).reshape(a.d_model, -1)
            value = (norm(stream) @ joined).unflatten(-1, (len(weight), a.d_head))
        return value if bias is None else value.add_(bias)

    @torch.no_grad()
    def readers(self, layer: int, dtype: torch.dtype) -> Readers:
        """The q, k and v projections of all heads of a layer, in that order.

        Raises:
            ModelError: heads share keys and values.
        """
        self._refuse_shared("gradients of single heads")
        a = self._architecture
        norm = self._in_block(layer, a.attention_norm)
        # Joined side by side as they are stored, not head by head: long rows copy faster.
        weights = [self.heads(layer, port).transpose(0, 1) for port in PORTS]
        weight = torch.cat(weights, 1).transpose(0, 1)
        shift = getattr(norm, "bias", None)
        at_shift = weight.new_zeros(3 * a.n_heads, a.d_head) if shift is None else shift @ weight
        biases = [self._head_bias(Site(port, layer)) for port in PORTS]
        if any(bias is not None for bias in biases):
            none = weight.new_zeros(a.n_heads, a.d_head)
            at_shift = at_shift + torch.cat([none if bias is None else bias for bias in biases])
        return Readers(norm, weight.to(dtype), at_shift.to(dtype))

    @torch.no_grad()
    def reading(self, site: Site) -> Iterator[Tensor]:
        """What reads a site linearly; a direction orthogonal to all of it is seen by nothing.

        Args:
            site: ``z`` of one head, read by the output projection; ``mlp_post``, read by the MLP's;
                or ``resid_pre``, ``resid_mid``, ``resid_post``: read by all later heads, MLPs and
                the unembedding, through norms. The linear part of a norm is folded in. Its division
                by the stream's size is not: through that alone every direction is felt.

        Yields:
            ``[width, n]``, float64. One tensor for ``z`` and ``mlp_post``: what a change there
            writes to the stream is the change times it.

        Raises:
            SiteError: the site is of another kind or does not exist, or the MLPs' own maps are not
                known.
        """
        self._locator.check(site)
        layer = site.layer
        if site.kind == "z" and site.head is not None and layer is not None:
            yield self.heads(layer, "o")[site.head].double()
        elif site.kind == "mlp_post" and layer is not None:
            yield self._mlp_output(layer).double()
        elif site.kind in ("resid_pre", "resid_mid", "resid_post") and layer is not None:
            yield from self._stream_readers(layer, site.kind)
        else:
            raise SiteError(
                f"site {site} has no readers of its own; give z of one head, mlp_post, resid_pre, "
                f"resid_mid or resid_post of a layer"
            )

    def _mlp_output(self, layer: int) -> Tensor:
        """The output projection of an MLP, ``[d_mlp, d_model]``."""
        a = self._architecture
        weight = _input_by_output(self._in_block(layer, a.mlp_output_projection))
        if len(weight) != a.d_mlp:
            raise SiteError(
                f"{a.mlp_output_projection} of layer {layer} reads {len(weight)} numbers, and the "
                f"architecture of {a.family} says d_mlp = {a.d_mlp}; correct one of them"
            )
        return weight

    def _stream_readers(self, layer: int, kind: str) -> Iterator[Tensor]:
        """Heads, MLPs and unembedding that read the stream after this site, norms folded."""
        a = self._architecture
        for later in range(layer + (kind == "resid_post"), a.n_layers):
            if kind != "resid_mid" or later > layer:
                heads = [self.heads(later, p).transpose(0, 1).flatten(1) for p in PORTS]
                yield from (self._norm(later).fold(head.double()) for head in heads)
            mlp_norm = read_norm(self._in_block(later, a.mlp_norm), a.d_model)
            yield from (mlp_norm.fold(reader.double()) for reader in self._mlp_inputs(later))
        final = self._norm(None)
        unembedding = _input_by_output(self._module.get_submodule(a.unembedding))
        for part in torch.split(unembedding, _COLUMNS, 1):
            yield final.fold(part.double())

    def _mlp_inputs(self, layer: int) -> list[Tensor]:
        """The linear maps of an MLP that read the residual stream."""
        self._locator.check(Site("mlp_post", layer))
        a = self._architecture
        last = self._in_block(layer, a.mlp_output_projection)
        maps = [
            _input_by_output(part)
            for part in self._in_block(layer, a.mlp).modules()
            if isinstance(part, nn.Linear | Conv1D) and part is not last
        ]
        found = [weight for weight in maps if len(weight) == a.d_model]
        if not found:
            raise SiteError(
                f"the MLP of layer {layer} has no linear map that reads {a.d_model} numbers, so "
                f"what it sees of the stream is not known; give z or mlp_post"
            )
        return found

    def _head_bias(self, site: Site) -> Tensor | None:
        """Bias of a q, k or v projection, ``[n_heads, d_head]``."""
        assert site.layer is not None
        path = self._architecture.projection(site.kind).path
        bias: Any = self._in_block(site.layer, path).bias
        return None if bias is None else self._locator.view(site, bias.detach()[None, None])[0, 0]

    def _refuse_shared(self, asked: str) -> None:
        """Refuse what takes keys and values that each head has to itself."""
        a = self._architecture
        if a.n_heads_of("k") != a.n_heads:
            raise ModelError(
                f"the {a.n_heads} heads of a {a.family} layer share {a.n_heads_of('k')} key and "
                f"value heads, which have no {asked}; path-patching patches its edges one by one"
            )

    def _norm_module(self, layer: int | None) -> nn.Module:
        a = self._architecture
        if layer is None:
            return self._module.get_submodule(a.final_norm)
        return self._in_block(layer, a.attention_norm)

    def _norm(self, layer: int | None) -> Norm:
        """The norm that feeds a layer's attention, or the unembedding."""
        if layer is not None:
            self._locator.check(Site("resid_pre", layer))
        return read_norm(self._norm_module(layer), self._architecture.d_model)

    def _centred(self, written: Tensor) -> Tensor:
        """What is written, ``[..., d_model]``, less its mean where no reader sees the mean."""
        return written - written.mean(-1, keepdim=True) if self.centres else written

    def _in_block(self, layer: int, path: str) -> nn.Module:
        return self._module.get_submodule(self._architecture.block(layer, path))


def _input_by_output(module: nn.Module) -> Tensor:
    """Weight of a linear map as ``[d_in, d_out]``, whichever way the class stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, nn.Linear) else weight.detach()


def _bias(module: nn.Module) -> Tensor:
    """Bias of a linear map, ``[d_out]``; zeros where it has none."""
    bias: Any = module.bias
    if bias is None:
        weight = _input_by_output(module)
        return weight.new_zeros(weight.shape[1])
    return bias.detach()  # type: ignore[no-any-return]  # nn.Module types no attribute
