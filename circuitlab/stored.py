"""Weights as a model stores them: by head, and what norms behind a projection divide by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from circuitlab.architectures import Architecture
from circuitlab.errors import ModelError, SiteError
from circuitlab.norms import Norm, read_norm, shares
from circuitlab.plans import Locator
from circuitlab.sites import Site
from circuitlab.wiring import PORTS

#: Tokens by which it is seen whether an embedding multiplies its weight.
_TRIED_TOKENS = 64


class StoredWeights:
    """The part of :class:`circuitlab.Weights` in which no norm is folded into what reads it."""

    def __init__(self, module: nn.Module, locator: Locator) -> None:
        self._module = module
        self._locator = locator

    @property
    def _architecture(self) -> Architecture:
        """The description of the model's parts; refused where only its blocks are known."""
        return self._locator.architecture.described()

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
            weight = input_by_output(self._in_block(layer, a.output_projection))
            return weight.view(a.n_heads, a.d_head, -1)
        weight = input_by_output(self._in_block(layer, a.projection(which).path))
        columns, step = self._locator.columns(site, 0), a.projection(which).stride
        n_heads = a.n_heads_of(which)
        part = weight[:, columns.start : columns.start + (n_heads - 1) * step + a.d_head]
        return part.unfold(-1, a.d_head, step).transpose(0, 1)

    @torch.no_grad()
    def embedding(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What each token puts into the residual stream, ``[vocab, d_model]``; not centred.

        Where the model multiplies its embeddings (Gemma), so are these, rounded to its type as in a
        run.
        """
        a = self._locator.architecture
        module: Any = self._module.get_submodule(a.embed)
        weight: Tensor = module.weight.detach()
        tried = torch.linspace(0, len(weight) - 1, _TRIED_TOKENS, device=weight.device).long()
        if not torch.equal(module(tried), weight[tried]):
            weight = module(torch.arange(len(weight), device=weight.device))
        return (weight if a.embed_scale == 1 else weight * a.embed_scale).to(dtype)

    @torch.no_grad()
    def positions(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """What each position adds to the stream, ``[n_positions, d_model]``; None where nothing."""
        path = self._architecture.position_embed
        if not path:
            return None
        weight: Any = self._module.get_submodule(path).weight
        return weight.detach().to(dtype)  # type: ignore[no-any-return]  # nn.Module's attribute

    @torch.no_grad()
    def shares(self, site: Site, parts: Tensor) -> Tensor:
        """What each part of a module's output adds to the stream, the norm behind it applied.

        Args:
            site: ``attn_out`` or ``mlp_out``.
            parts: Addends of what that module gives, ``[parts, ..., d_model]``. They are divided by
                the scale of their sum, and changed in place; nothing is done where no norm stands
                behind the module.
        """
        a, layer = self._architecture, site.layer
        path = a.attention_post_norm if site.kind == "attn_out" else a.mlp_post_norm
        assert layer is not None
        return shares(self._in_block(layer, path), parts) if path else parts

    @torch.no_grad()
    def norm_at(self, site: Site) -> Norm:
        """The norm that reads what is at a site, as a formula; an identity where there is none.

        Args:
            site: ``resid_pre`` or ``mlp_in``: the norm that feeds a layer's attention or MLP. Or a
                whole ``q``, ``k``, ``z`` or ``mlp_post``: the norm behind it, as of
                :meth:`scale_behind`.

        Returns:
            The norm, its gain ``[d_model]``; of q and k ``[d_head]``, or ``[n_heads * d_head]``
            where all heads are normed together, of k with ``n_kv_heads``.

        Raises:
            SiteError: the site is of another kind or does not exist.
            ModelError: the norm is neither a LayerNorm, an RMSNorm nor an identity; or it stands
                behind a projection and is no RMSNorm.
        """
        self._locator.check(site)
        a, layer = self._architecture, site.layer
        before = {"resid_pre": a.attention_norm, "mlp_in": a.mlp_norm}
        paths = {**before, **self._behind}
        if layer is None or site.kind not in paths:
            raise SiteError(f"no norm reads site {site}; give {', '.join(paths)} of a layer")
        path = paths[site.kind]
        module = self._in_block(layer, path)
        own = a.d_head if site.kind in PORTS else a.d_model
        norm = read_norm(module, max((p.numel() for p in module.parameters()), default=own))
        if site.kind not in before and (norm.centred or bool(norm.shift.any())):
            raise ModelError(
                f"norm {a.block(layer, path)} of class {type(module).__name__} stands behind a "
                f"projection and takes off a mean or adds a shift, which cannot be folded into "
                f"that projection; only an RMSNorm can"
            )
        return norm

    @property
    def _behind(self) -> dict[str, str]:
        """Norms behind projections, by the site before each."""
        a = self._architecture
        return {
            "q": a.q_norm, "k": a.k_norm, "z": a.attention_post_norm, "mlp_post": a.mlp_post_norm
        }  # fmt: skip

    @torch.no_grad()
    def scale_behind(self, site: Site, value: Tensor) -> Tensor:
        """What the norm behind a site divides by; 1 where there is none.

        The gain of such a norm is folded into :meth:`Weights.folded` and :meth:`Weights.mlp`, this
        is not: it is that of each token in a run.

        Args:
            site: A whole ``q``, ``k`` or ``v``: the norm of queries or keys (Qwen 3, OLMo 2). Or a
                whole ``z`` or ``mlp_post``: the norm of what their output projection gives, all
                heads together, before it is added to the stream (Gemma 2, OLMo 2).
            value: What a run has there, ``[..., n_heads, d_head]`` or ``[..., d_mlp]``; of k and v
                ``n_kv_heads`` where they are shared.

        Returns:
            ``[..., n_heads, 1]`` of q, k and v, where the heads of OLMo 2 have one scale together;
            ``[..., 1]`` of z and mlp_post.

        Raises:
            SiteError: the site is of another kind or does not exist.
            ModelError: the norm is neither a LayerNorm, an RMSNorm nor an identity.
        """
        self._locator.check(site)
        a, layer = self._architecture, site.layer
        if layer is None or site.kind not in (*PORTS, "z", "mlp_post"):
            raise SiteError(f"no norm stands behind site {site}; give q, k, v, z or mlp_post")
        if site.kind in PORTS:
            module = self._in_block(layer, self._behind.get(site.kind, ""))
            if not _joint(module, a.d_head):
                return read_norm(module, a.d_head).scale(module, value)
            flat = value.flatten(-2)
            scale = read_norm(module, flat.shape[-1]).scale(module, flat)
            return scale[..., None, :].expand(*value.shape[:-1], 1)
        path = self._behind[site.kind]
        last = a.output_projection if site.kind == "z" else a.mlp_output_projection
        flat = value.flatten(-2) if site.kind == "z" else value
        if not path:
            return torch.ones_like(flat[..., :1])
        module, projection = self._in_block(layer, path), self._in_block(layer, last)
        given = flat @ input_by_output(projection).to(flat) + bias_of(projection).to(flat)
        return read_norm(module, a.d_model).scale(module, given)

    def _gain_behind(self, site: Site, width: int) -> Tensor:
        """Gain of the norm behind a site, float64, ``[width]`` or ``[n, width]`` by head.

        Raises:
            ModelError: it does more than divide by a size and multiply by a gain.
        """
        gain = self.norm_at(site).gain
        return gain if len(gain) == width else gain.view(-1, width)

    def attention_bias(self, layer: int) -> Tensor:
        """What a layer's attention adds beside its heads, ``[d_model]``; the same for every prompt.

        Raises:
            SiteError: the layer does not exist.
        """
        self._locator.check(Site("attn_out", layer))
        return bias_of(self._in_block(layer, self._architecture.output_projection))

    def _mlp_output(self, layer: int) -> Tensor:
        """The output projection of an MLP, ``[d_mlp, d_model]``."""
        a = self._architecture
        weight = input_by_output(self._in_block(layer, a.mlp_output_projection))
        if len(weight) != a.d_mlp:
            raise SiteError(
                f"{a.mlp_output_projection} of layer {layer} reads {len(weight)} numbers, and the "
                f"architecture of {a.family} says d_mlp = {a.d_mlp}; correct one of them"
            )
        return weight

    def _head_bias(self, site: Site) -> Tensor | None:
        """Bias of a q, k or v projection, ``[n_heads, d_head]``."""
        assert site.layer is not None
        path = self._architecture.projection(site.kind).path
        bias: Any = self._in_block(site.layer, path).bias
        return None if bias is None else self._locator.view(site, bias.detach()[None, None])[0, 0]

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

    def _in_block(self, layer: int, path: str) -> nn.Module:
        """A module of a block; where the family has none, one that does nothing."""
        if not path:
            return nn.Identity()
        return self._module.get_submodule(self._architecture.block(layer, path))


def _joint(module: nn.Module, width: int) -> bool:
    """Whether a norm takes more than ``width`` numbers together: all heads side by side."""
    return any(parameter.numel() != width for parameter in module.parameters())


def input_by_output(module: nn.Module) -> Tensor:
    """Weight of a linear map as ``[d_in, d_out]``, whichever way the class stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, nn.Linear) else weight.detach()


def bias_of(module: nn.Module) -> Tensor:
    """Bias of a linear map, ``[d_out]``; zeros where it has none."""
    bias: Any = module.bias
    if bias is None:
        weight = input_by_output(module)
        return weight.new_zeros(weight.shape[1])
    return bias.detach()  # type: ignore[no-any-return]  # nn.Module types no attribute
