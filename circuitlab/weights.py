"""Weights: a model's weights by head and by reader, whichever way its family stores them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitlab.errors import ModelError, SiteError
from circuitlab.folded import HeadWeights, MlpWeights
from circuitlab.norms import Readers, read_norm
from circuitlab.sites import Site
from circuitlab.stored import StoredWeights, bias_of, input_by_output
from circuitlab.wiring import PORTS

#: Columns of a reader handed out at once: an unembedding in float64 would take gigabytes.
_COLUMNS = 8192


class Weights(StoredWeights):
    """A model's weights by head and by reader, found where its architecture says they are.

    Made by :class:`circuitlab.TracedModel` as its ``weights``. Linear maps are given for row
    vectors, ``x @ W``.
    """

    @torch.no_grad()
    def folded(
        self, layer: int, dtype: torch.dtype = torch.float32, *, behind: bool = True
    ) -> HeadWeights:
        """All heads of a layer, their norms folded in; see :class:`HeadWeights`.

        Args:
            layer: The layer.
            dtype: Type of what is given.
            behind: Whether gains of norms behind projections are folded in too; without them q, k
                and what is written are what those norms (:meth:`norm_at`) read.

        Raises:
            SiteError: the layer does not exist.
            ModelError: its norm is neither a LayerNorm, an RMSNorm nor an identity, or a norm
                behind a projection is no RMSNorm.
        """
        a = self._architecture
        norm = self._norm(layer)
        ports: list[Tensor] = []
        biases: list[Tensor] = []
        for port in PORTS:
            weight, bias = self.heads(layer, port).double(), self._head_bias(Site(port, layer))
            shifted, weight = norm.shift @ weight, norm.fold(weight)
            both = shifted if bias is None else shifted + bias.double()
            if behind and self._behind.get(port):
                gain = self._gain_behind(Site(port, layer), a.d_head)
                weight, both = weight * gain[..., None, :], both * gain
            group = a.n_heads // len(weight)
            ports.append(weight.to(dtype).repeat_interleave(group, 0))
            biases.append(both.to(dtype).repeat_interleave(group, 0))
        written = self.heads(layer, "o").double()
        if behind and a.attention_post_norm:
            written = written * self._gain_behind(Site("z", layer), a.d_model)
        output = self._centred(written).to(dtype)
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
    def mlp(
        self, layer: int, dtype: torch.dtype = torch.float32, *, behind: bool = True
    ) -> MlpWeights:
        """The MLP of a layer, its norms folded in; see :class:`MlpWeights`.

        Args:
            layer: The layer.
            dtype: Type of what is given.
            behind: Whether the gain of a norm behind the MLP is folded in too; without it what is
                written is what that norm (:meth:`norm_at`) reads.

        Raises:
            SiteError: the layer does not exist, or the architecture does not name the MLP's maps
                and its nonlinearity.
            ModelError: its norm is neither a LayerNorm, an RMSNorm nor an identity, or the norm
                behind it is no RMSNorm.
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

        def folded(path: str, offset: int) -> tuple[Tensor, Tensor]:
            module, columns = self._in_block(layer, path), slice(offset, offset + a.d_mlp)
            weight = input_by_output(module)[:, columns].double()
            bias = norm.shift @ weight + bias_of(module)[columns].double()
            return norm.fold(weight).to(dtype), bias.to(dtype)

        last = bias_of(self._in_block(layer, a.mlp_output_projection))
        gain = torch.ones_like(last, dtype=torch.float64)
        if behind and a.mlp_post_norm:
            gain = self._gain_behind(Site("mlp_post", layer), a.d_model)
        return MlpWeights(
            *folded(a.mlp_input_projection, a.mlp_input_offset),
            self._in_block(layer, a.mlp_activation),
            (self._mlp_output(layer) * gain).to(dtype),
            (last * gain).to(dtype),
            *(folded(a.mlp_gate_projection, a.mlp_gate_offset) if a.mlp_gate_projection else ()),
        )

    @torch.no_grad()
    def unembedding(
        self, dtype: torch.dtype = torch.float32, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From the last residual stream ``x`` to logits, the final norm folded in.

        Args:
            dtype: Type of what is given.
            tokens: Ids of the tokens whose logits are wanted, ``[n]``; None for all.

        Returns:
            ``[d_model, vocab]`` and ``[vocab]``: logits are ``x / σ @ weight + bias`` with ``σ`` of
            ``norm_scale(None, x)``. Where the model caps its logits (Gemma 2), before
            the cap.

        Raises:
            ModelError: the norm is neither a LayerNorm, an RMSNorm nor an identity.
        """
        norm, module = self._norm(None), self._module.get_submodule(self._architecture.unembedding)
        weight, own = input_by_output(module), getattr(module, "bias", None)
        if tokens is not None:
            weight, own = weight[:, tokens], None if own is None else own[tokens]
        weight = weight.to(dtype)
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
    def rotations(
        self, positions: Tensor, dtype: torch.dtype = torch.float32, layer: int | None = None
    ) -> Tensor | None:
        """How rotary embeddings turn queries and keys, ``[n, d_head, d_head]``, one per position.

        A row vector ``q`` at a position becomes ``q @ R``; ``R_i @ R_j^T`` depends on ``i - j``
        alone. Where the model multiplies turned columns by a number as well (YaRN), R does. None
        for a model without them.

        Args:
            positions: ``[n]``; of one prompt, where turns depend on its length.
            dtype: Type of what is given.
            layer: Whose; may be left out where all layers turn alike.

        Raises:
            ModelError: layers turn differently (Gemma 3), and none is named.
            SiteError: the layer does not exist.
        """
        a = self._architecture
        if not a.rotary:
            return None
        if layer is not None:
            self._locator.check(Site("q", layer))
        elif len(set(a.rotary_kinds)) > 1:
            raise ModelError(
                f"the layers of a {a.family} model turn queries and keys in different ways; name "
                f"the layer whose rotations are meant"
            )
        module, kind = self._module.get_submodule(a.rotary), a.rotary_kinds[layer or 0 :][:1]
        like = torch.zeros(1, dtype=torch.float64, device=positions.device)
        cos, sin = (part[0].to(dtype) for part in module(like, positions[None], *kind))
        width = cos.shape[-1]
        turn = torch.eye(a.d_head, dtype=dtype, device=cos.device).repeat(len(cos), 1, 1)
        unit = torch.eye(width, dtype=dtype, device=cos.device)
        half = torch.cat([-unit[:, width // 2 :], unit[:, : width // 2]], -1)
        turn[:, :width, :width] = unit * cos[:, None] + half * sin[:, None]
        return turn

    @torch.no_grad()
    def projected(self, site: Site, stream: Tensor, *, per_head: bool = False) -> Tensor:
        """The q, k or v that a layer would compute from another residual stream.

        Args:
            site: A whole ``q``, ``k`` or ``v``.
            stream: ``[..., batch, pos, d_model]``; the layer's norm is applied to it here.
            per_head: Whether each head, of k and v each of the ``n_kv_heads``, has a stream of its
                own: ``[..., n_heads, batch, pos, d_model]``.

        Returns:
            ``[..., batch, pos, n_heads, d_head]``; of k and v ``n_kv_heads`` where they are shared.

        Raises:
            SiteError: the site is of another kind or does not exist.
        """
        if site.kind not in PORTS or site.layer is None:
            raise SiteError(f"site {site} is not a projection; give q, k or v of a layer")
        self._locator.check(site)
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
        """The q, k and v projections of all heads of a layer, shared ones repeated."""
        a = self._architecture
        norm = self._in_block(layer, a.attention_norm)
        weights, biases = [], []
        for port in PORTS:
            weight, bias = self.heads(layer, port), self._head_bias(Site(port, layer))
            group = a.n_heads // len(weight)
            none = weight.new_zeros(len(weight), a.d_head)
            weight, bias = weight.transpose(0, 1), none if bias is None else bias
            if group > 1:
                weight, bias = (x.repeat_interleave(group, -2) for x in (weight, bias))
            weights.append(weight)
            biases.append(bias)
        # Joined side by side as they are stored, not head by head: long rows copy faster.
        weight = torch.cat(weights, 1).transpose(0, 1)
        shift = getattr(norm, "bias", None)
        at_shift = torch.cat(biases)
        if shift is not None:
            at_shift = at_shift + shift @ weight
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
            writes to the stream is the change times it, before any norm behind the module.

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
        unembedding = input_by_output(self._module.get_submodule(a.unembedding))
        for part in torch.split(unembedding, _COLUMNS, 1):
            yield final.fold(part.double())

    def _mlp_inputs(self, layer: int) -> list[Tensor]:
        """The linear maps of an MLP that read the residual stream."""
        self._locator.check(Site("mlp_post", layer))
        a = self._architecture
        last = self._in_block(layer, a.mlp_output_projection)
        maps = [
            input_by_output(part)
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

    def _centred(self, written: Tensor) -> Tensor:
        """What is written, ``[..., d_model]``, less its mean where no reader sees the mean."""
        return written - written.mean(-1, keepdim=True) if self.centres else written
