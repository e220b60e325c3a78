"""Weights: a model's weights by head and by reader, whichever way its family stores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitlab.errors import SiteError
from circuitlab.norms import Readers
from circuitlab.plans import Locator
from circuitlab.sites import Site
from circuitlab.wiring import PORTS

#: Columns of a reader handed out at once: an unembedding in float64 would take gigabytes.
_COLUMNS = 8192


class Weights:
    """Reads the weights of a module where its architecture says they are."""

    def __init__(self, module: nn.Module, locator: Locator) -> None:
        self._module = module
        self._locator = locator
        self._architecture = locator.architecture

    def heads(self, layer: int, which: str) -> Tensor:
        """``[n_heads, d_model, d_head]`` for q, k and v; ``[n_heads, d_head, d_model]`` for o."""
        site = Site("z" if which == "o" else which, layer)
        self._locator.check(site)
        a = self._architecture
        if which == "o":
            weight = _input_by_output(self._in_block(layer, a.output_projection))
            return weight.view(a.n_heads, a.d_head, -1)
        weight = _input_by_output(self._in_block(layer, a.projection(which).path))
        columns, step = self._locator.columns(site, 0), a.projection(which).stride
        part = weight[:, columns.start : columns.start + (a.n_heads - 1) * step + a.d_head]
        return part.unfold(-1, a.d_head, step).transpose(0, 1)

    def output_bias(self, layer: int) -> Tensor:
        """What a layer's attention adds beside its heads, ``[d_model]``."""
        self._locator.check(Site("attn_out", layer))
        projection = self._in_block(layer, self._architecture.output_projection)
        bias: Any = projection.bias
        if bias is None:
            return _input_by_output(projection).new_zeros(self._architecture.d_model)
        return bias.detach()  # type: ignore[no-any-return]  # nn.Module types no attribute

    @torch.no_grad()
    def projected(self, site: Site, stream: Tensor, *, per_head: bool) -> Tensor:
        """See :meth:`circuitlab.TracedModel.projected`."""
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
            value = (norm(stream) @ joined).unflatten(-1, (a.n_heads, a.d_head))
        return value if bias is None else value.add_(bias)

    @torch.no_grad()
    def readers(self, layer: int, dtype: torch.dtype) -> Readers:
        """The q, k and v projections of all heads of a layer, in that order."""
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
        """See :meth:`circuitlab.TracedModel.reading_weights`."""
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
                yield from _through(self._in_block(later, a.attention_norm), heads)
            yield from _through(self._in_block(later, a.mlp_norm), self._mlp_inputs(later))
        unembedding = _input_by_output(self._module.get_submodule(a.unembedding))
        yield from _through(
            self._module.get_submodule(a.final_norm), torch.split(unembedding, _COLUMNS, 1)
        )

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

    def _in_block(self, layer: int, path: str) -> nn.Module:
        return self._module.get_submodule(self._architecture.block(layer, path))


def _through(norm: nn.Module, readers: Sequence[Tensor]) -> Iterator[Tensor]:
    """Readers ``[d_model, n]`` with the norm before them folded in, up to a factor; float64.

    What is folded is the norm's linear part, its centring and its gain. It also divides by a size,
    and that is the same for all unit vectors.
    """
    units = torch.eye(len(readers[0]), dtype=torch.float64, device=readers[0].device)
    wide = {name: tensor.detach().double() for name, tensor in norm.state_dict().items()}
    both = torch.stack([units, torch.zeros_like(units)])
    normed: Tensor = torch.func.functional_call(norm, wide, both)
    folded = normed[0] - normed[1]
    for reader in readers:
        yield folded @ reader.double()


def _input_by_output(module: nn.Module) -> Tensor:
    """Weight of a linear map as ``[d_in, d_out]``, whichever way the class stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, nn.Linear) else weight.detach()
