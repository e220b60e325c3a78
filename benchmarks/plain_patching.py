"""Exact effects of single edges of GPT-2 in plain PyTorch, written by hand for speed.

The reference run is done once. A patched run starts at its receiver: a source's other output is
added to what the receiver reads, the receiver is recomputed, and its change travels on through all
later layers. Many edges share one batch, and all q, k and v ports of a layer share one projection
per source. In the last block nothing but keys and values is computed before the last position, and
of the unembedding nothing but right minus wrong answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name PyTorch's own pages use)
from torch import Tensor


class Kept(NamedTuple):
    """What one layer of the reference run leaves; q, k, v, z are ``[batch, head, pos, d_head]``."""

    stream: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    mid: Tensor


class Layer:
    """One block's weights, and its parts as functions of ``[rows, d_model]``."""

    def __init__(self, block: Any, n_heads: int) -> None:
        def weights(module: Any) -> tuple[Tensor, Tensor]:
            return module.weight.detach().contiguous(), module.bias.detach()

        self.norm1, self.norm2 = weights(block.ln_1), weights(block.ln_2)
        self.eps = block.ln_1.eps
        self.qkv, self.qkv_bias = weights(block.attn.c_attn)
        self.out, self.out_bias = weights(block.attn.c_proj)
        self.up, self.up_bias = weights(block.mlp.c_fc)
        self.down, self.down_bias = weights(block.mlp.c_proj)
        self.d_model = self.out.shape[0]
        self.heads_out = self.out.view(n_heads, -1, self.d_model)
        d = self.d_model
        self.q, self.q_bias = self.qkv[:, :d].contiguous(), self.qkv_bias[:d]
        self.kv, self.kv_bias = self.qkv[:, d:].contiguous(), self.qkv_bias[d:]

    def normed(self, stream: Tensor) -> Tensor:
        """What the attention's projections read."""
        return F.layer_norm(stream, (self.d_model,), *self.norm1, self.eps)

    def mlp(self, mid: Tensor) -> Tensor:
        """What the MLP adds to the stream."""
        hidden = torch.addmm(
            self.up_bias, F.layer_norm(mid, (self.d_model,), *self.norm2, self.eps), self.up
        )
        return torch.addmm(self.down_bias, F.gelu(hidden, approximate="tanh"), self.down)


class PlainPatcher:
    """Exact effects of edges, for one batch of prompt pairs.

    Effects are metric(edge patched) - metric(clean) per pair; the metric is right minus wrong
    answer's logit at the last position.

    Args:
        module: A ``GPT2LMHeadModel`` in evaluation mode.
        clean: Token ids ``[batch, pos]``, without padding.
        corrupt: Token ids ``[batch, pos]``.
        right: Right answers ``[batch]``.
        wrong: Wrong answers ``[batch]``.
        chunk: Edges in one batch.
    """

    @torch.inference_mode()
    def __init__(
        self, module: Any, clean: Tensor, corrupt: Tensor, right: Tensor, wrong: Tensor, chunk: int
    ) -> None:
        config, gpt2 = module.config, module.transformer
        self.n_heads, self.d_model = config.n_head, config.n_embd
        self.d_head = self.d_model // self.n_heads
        self.layers = [Layer(block, self.n_heads) for block in gpt2.h]
        self.final_norm = gpt2.ln_f.weight.detach(), gpt2.ln_f.bias.detach()
        self.embed, self.positions = gpt2.wte.weight.detach(), gpt2.wpe.weight.detach()
        unembed = module.lm_head.weight.detach()
        self.answer = unembed[right] - unembed[wrong]
        self.batch, self.pos = clean.shape
        self.chunk = chunk
        self.kept, self.final, base = self._reference(clean)
        self.difference = self._reference(corrupt)[2] - base
        self.base = self._metric(self.final[:, -1])

    @torch.inference_mode()
    def edges(self, kind: str, layer: int, sources: Tensor) -> Tensor:
        """Effects of all edges from some sources into one block of receivers.

        Args:
            kind: ``attention``, ``mlp`` or ``logits``.
            layer: The block's layer.
            sources: Rows of sources: input, then of each layer the heads and the MLP.

        Returns:
            ``[n_sources, n_receivers, batch]``; of a layer's attention q of each head, k, then v.
        """
        if kind == "logits":
            last = self.final[:, -1] + self.difference[sources, :, -1]
            return (self._metric(last) - self.base)[:, None]
        if kind == "mlp":
            return torch.cat([self._into_mlp(layer, part) for part in sources.split(self.chunk)])
        size = max(1, self.chunk // (3 * self.n_heads))
        return torch.cat([self._into_heads(layer, part) for part in sources.split(size)])

    def _reference(self, ids: Tensor) -> tuple[list[Kept], Tensor, Tensor]:
        """What each layer leaves, the final stream, and every source ``[n, batch, pos, d_model]``.

        Heads are without the output bias, which is the same in every run.
        """
        stream = self.embed[ids] + self.positions[: self.pos]
        kept, sources = [], [stream[None]]
        for layer in self.layers:
            q, k, v = self._heads(self._qkv(layer, self._flat(stream)))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            sources.append(torch.einsum("bhsd,hdm->hbsm", z, layer.heads_out))
            mid = stream + sources[-1].sum(0) + layer.out_bias
            kept.append(Kept(stream, q, k, v, z, mid))
            sources.append(layer.mlp(self._flat(mid)).view_as(mid)[None])
            stream = mid + sources[-1][0]
        return kept, stream, torch.cat(sources)

    def _into_heads(self, number: int, sources: Tensor) -> Tensor:
        n, last = len(sources), number == len(self.layers) - 1
        change = self._z_changes(number, sources)
        # [head, source * port * pair * position, d_model]: one product per head, not per edge.
        change = torch.bmm(change, self.layers[number].heads_out)
        mid = self.kept[number].mid[:, -1:] if last else self.kept[number].mid
        streams = change.view(self.n_heads * n * 3, *mid.shape)
        scores = torch.cat(
            [self._after_attention(number, mid + part) for part in streams.split(self.chunk)]
        )
        effects = (scores - self.base).view(self.n_heads, n, 3, -1)
        return effects.permute(1, 2, 0, 3).flatten(1, 2)

    def _z_changes(self, number: int, sources: Tensor) -> Tensor:
        """Change of each head's z when one of its own ports reads the patched stream.

        Returns:
            ``[n_heads, n_sources * 3 * batch * pos, d_head]``; the last position alone in the last
            layer.
        """
        layer, kept = self.layers[number], self.kept[number]
        n, last = len(sources), number == len(self.layers) - 1
        normed = layer.normed(kept.stream + self.difference[sources])
        if last:
            q = torch.addmm(layer.q_bias, normed[:, :, -1].flatten(0, 1), layer.q)
            q = q.view(n * self.batch, 1, self.n_heads, self.d_head).transpose(1, 2)
            kv = torch.addmm(layer.kv_bias, self._flat(normed), layer.kv)
            k, v = self._heads(kv, 2)
        else:
            qkv = torch.addmm(layer.qkv_bias, self._flat(normed), layer.qkv)
            q, k, v = self._heads(qkv)
        base_q = kept.q[:, :, -1:] if last else kept.q
        base_z = kept.z[:, :, -1:] if last else kept.z
        old_q, old_k, old_v = (x.repeat(n, 1, 1, 1) for x in (base_q, kept.k, kept.v))
        new = torch.stack(
            [
                F.scaled_dot_product_attention(*ports, is_causal=not last)
                for ports in ((q, old_k, old_v), (old_q, k, old_v), (old_q, old_k, v))
            ]
        )
        # [port, source, pair, head, pos, d_head] -> [head, source, port, pair, pos, d_head]
        change = new.view(3, n, *base_z.shape) - base_z
        return change.permute(3, 1, 0, 2, 4, 5).reshape(self.n_heads, -1, self.d_head)

    def _into_mlp(self, number: int, sources: Tensor) -> Tensor:
        mid, change = self.kept[number].mid, self.difference[sources]
        if number == len(self.layers) - 1:
            mid, change = mid[:, -1:], change[:, :, -1:]
        read = mid + change
        written = self.layers[number].mlp(self._flat(read)).view_as(read)
        return (self._from_layer(number + 1, mid + written) - self.base)[:, None]

    def _after_attention(self, number: int, mid: Tensor) -> Tensor:
        """Metric ``[n, batch]`` from the streams ``[n, batch, pos, d_model]`` before an MLP."""
        written = self.layers[number].mlp(self._flat(mid))
        return self._from_layer(number + 1, mid.add_(written.view_as(mid)))

    def _from_layer(self, number: int, stream: Tensor) -> Tensor:
        """Metric ``[n, batch]`` from the streams ``[n, batch, pos, d_model]`` before a layer."""
        shape, flat = stream.shape, self._flat(stream)
        for layer in self.layers[number:-1]:
            q, k, v = self._heads(self._qkv(layer, flat))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            z = z.transpose(1, 2).reshape(-1, self.d_model)
            flat = flat + torch.addmm(layer.out_bias, z, layer.out)
            flat += layer.mlp(flat)
        stream = flat.view(shape)
        if number < len(self.layers):
            stream = self._last_layer(stream)
        return self._metric(stream[:, :, -1])

    def _last_layer(self, stream: Tensor) -> Tensor:
        layer, n = self.layers[-1], stream.shape[0]
        normed = layer.normed(stream)
        q = torch.addmm(layer.q_bias, normed[:, :, -1].flatten(0, 1), layer.q)
        q = q.view(-1, 1, self.n_heads, self.d_head).transpose(1, 2)
        k, v = self._heads(torch.addmm(layer.kv_bias, self._flat(normed), layer.kv), 2)
        z = F.scaled_dot_product_attention(q, k, v).reshape(-1, self.d_model)
        last = stream[:, :, -1].flatten(0, 1) + torch.addmm(layer.out_bias, z, layer.out)
        last += layer.mlp(last)
        return last.view(n, self.batch, 1, self.d_model)

    def _qkv(self, layer: Layer, flat: Tensor) -> Tensor:
        return torch.addmm(layer.qkv_bias, layer.normed(flat), layer.qkv)

    def _heads(self, projected: Tensor, n: int = 3) -> tuple[Tensor, ...]:
        """``[rows * pos, n * d_model]`` -> n times ``[rows, n_heads, pos, d_head]``."""
        split = projected.view(-1, self.pos, n, self.n_heads, self.d_head)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _flat(self, stream: Tensor) -> Tensor:
        return stream.reshape(-1, self.d_model)

    def _metric(self, last: Tensor) -> Tensor:
        """``[..., batch, d_model]`` of the last position -> ``[..., batch]``."""
        eps = self.layers[0].eps
        normed = F.layer_norm(last, (self.d_model,), *self.final_norm, eps)
        return (normed * self.answer).sum(-1)


def multiply_adds(
    layers: int, heads: int, width: int, pairs: int, tokens: int, kind: str, layer: int
) -> float:
    """Multiply-adds of matrix products and attention that one edge needs above.

    Args:
        layers: Layers of the model.
        heads: Heads of a layer; their 3 * heads ports share the projections of a source.
        width: ``d_model``; the MLP is four times as wide.
        pairs: Prompt pairs.
        tokens: Positions of a prompt.
        kind: ``attention``, ``mlp`` or ``logits``: what kind of receiver.
        layer: Its layer.
    """
    rows, last, d_head = pairs * tokens, layers - 1, width // heads
    mlp, square = 8 * width**2, width**2
    # A position attends to those before it and to itself, once for q k and once for z.
    triangle = rows * (tokens + 1)
    end = (2 * rows + 2 * pairs) * square + 2 * rows * width + pairs * mlp + pairs * width
    whole = rows * (4 * square + mlp) + triangle * width
    if kind == "logits":
        return pairs * width
    if kind == "attention" and layer == last:
        shared = (2 * rows + pairs) * square / (3 * heads)
        return shared + 2 * rows * d_head + pairs * (d_head * width + mlp + width)
    if kind == "mlp" and layer == last:
        return pairs * (mlp + width)
    after = rows * mlp + (last - layer - 1) * whole + end
    if kind == "mlp":
        return after
    return rows * square / heads + triangle * d_head + rows * d_head * width + after
