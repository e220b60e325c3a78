"""Injection: one forward pass with a coefficient per row, and what each component then says.

A vector v is added c times to a residual stream, another c in each row of the batch. The logit
difference of every row is the sum of what the components write at the last position, each along the
unembedding of the answers and divided by the scale of that row's own final norm: no approximation.
What a norm behind an attention or an MLP divides by is that of the row too; a cap of the logits is
undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from circuitlab import OptionError, QualityError, Site, TaskError, track

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import EncodedTask, Run, Tokens, TracedModel

#: How far the sum over components may be from the model's own logit difference: in logits, or as a
#: share of the largest attribution where that is above 1.
TOLERANCE = 1e-3
#: Bytes that the activations of one pass may take, when the batch size is not given.
MEMORY = 512 * 2**20
#: Largest share of its cap that a logit may have to be told from the cap itself.
_LARGEST = 1 - 2**-40


@dataclass(frozen=True)
class Readout:
    """A linear function of the logits for each prompt: what the answers have more than the others.

    Attributes:
        what: In words.
        tokens: The tokens whose logits it looks at, ``[n]``; None for all.
        weights: Weight of each of these logits, ``[n_prompts, n]``, float64.
        direction: What a unit along each axis of the normed last stream adds, ``[n_prompts,
            d_model]``, float64; the final norm's gain is folded in.
        bias: What the unembedding adds by itself, ``[n_prompts]``.
        softcap: ``c`` where the model makes logits ``c tanh(logit / c)``: undone, as only what was
            before is a sum over components. 0 for none.
    """

    what: str
    tokens: Tensor | None
    weights: Tensor
    direction: Tensor
    bias: Tensor
    softcap: float = 0.0

    def of(self, logits: Tensor, prompts: Tensor | slice = slice(None)) -> Tensor:
        """Its value for logits of ``tokens``, ``[n_rows, n]``, of these prompts: ``[n_rows]``."""
        logits = logits.to(self.weights.dtype)
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).clamp(-_LARGEST, _LARGEST).atanh()
        return (logits * self.weights[prompts]).sum(-1)


@dataclass(frozen=True)
class Injection:
    """A scan: for every coefficient and prompt, what each component adds to the logit difference.

    Attributes:
        coefficients: ``[n_coefficients]``, float64.
        names: Components: the model's sources, then ``biases`` (output biases of attention, the
            norm's and the unembedding's), then ``injection``, what is added at the last position
            itself. Empty where only the totals were asked for.
        attributions: ``[n_components, n_coefficients, n_prompts]``, float64, logits.
        totals: The model's own logit difference, ``[n_coefficients, n_prompts]``.
        neurons: What each neuron of the chosen layer adds, ``[d_mlp, n_coefficients, n_prompts]``,
            float32; None where none was chosen.
        gap: Largest difference between the sum over components and ``totals``, logits.
    """

    coefficients: Tensor
    names: tuple[str, ...]
    attributions: Tensor
    totals: Tensor
    neurons: Tensor | None
    gap: float


@torch.no_grad()
def readout(model: TracedModel, pairs: EncodedTask) -> Readout:
    """The logit difference of a task: mean logit of right less mean logit of wrong answers.

    Where no pair names a wrong answer, the mean over all logits takes its place.

    Raises:
        TaskError: some pairs name wrong answers and others do not.
        ModelError: the final norm is neither a LayerNorm, an RMSNorm nor an identity.
    """
    right, wrong = pairs.answers.right, pairs.answers.wrong
    named = (wrong >= 0).any(-1)
    if named.any() and not named.all():
        first = pairs.numbers[int((~named).nonzero()[0])]
        raise TaskError(
            f"task {pairs.task.name!r}, pair {first} names no wrong answer, and others do; name "
            f"some for every pair, or for none"
        )
    dtype = torch.promote_types(model.dtype, torch.float32)
    weight, bias = model.weights.unembedding(dtype)
    vocabulary = weight.shape[1]
    weights = _spread(right, vocabulary)
    if named.any():
        weights -= _spread(wrong, vocabulary)
        tokens = weights.any(0).nonzero()[:, 0]
        weights, weight, bias = weights[:, tokens], weight[:, tokens], bias[tokens]
        what = "mean logit of the right answers - mean logit of the wrong ones"
    else:
        weights -= 1 / vocabulary
        tokens, what = None, "mean logit of the right answers - mean of all logits"
    direction = (weights.to(weight) @ weight.T).double()
    softcap = model.architecture.logit_softcap
    what += ", before the cap of the logits" if softcap else ""
    return Readout(what, tokens, weights, direction, weights @ bias.double(), softcap)


@torch.no_grad()
def inject(
    model: TracedModel,
    tokens: Tokens,
    site: Site,
    added: Tensor,
    coefficients: Tensor,
    read: Readout,
    *,
    decompose: bool = True,
    neurons: int | None = None,
    batch_size: int | None = None,
    said: str = "injecting",
) -> Injection:
    """Add ``c * added`` to a residual stream for every coefficient c, and take the result apart.

    Args:
        model: Any traced model.
        tokens: The prompts.
        site: ``resid_pre``, ``resid_mid`` or ``resid_post`` of a layer.
        added: ``[n_prompts, pos, d_model]``.
        coefficients: ``[n_coefficients]``.
        read: The logit difference of these prompts.
        decompose: Whether components are wanted too; else only the totals.
        neurons: A layer whose MLP is also taken apart into its neurons.
        batch_size: Rows, each one prompt with one coefficient, per pass; None chooses by memory,
            so that small scans are one pass.
        said: What progress says.

    Raises:
        OptionError: the batch size is below 1.
        SiteError: the model has no such site.
        NumericsError: an activation is not finite; smaller coefficients may help.
        QualityError: the sum over components is not the model's logit difference.
    """
    coefficients = coefficients.to(read.direction)
    n_prompts, n_steps = len(tokens), len(coefficients)
    parts = _Parts(model, site, read, added[:, -1].to(read.direction), decompose, neurons)
    stream = parts.begin(tokens, batch_size)
    totals = read.direction.new_zeros(n_prompts * n_steps)
    found = totals.new_zeros(len(parts.names), len(totals))
    of_neurons = None
    if parts.neurons is not None:
        of_neurons = found.new_zeros(parts.neurons.shape[1], len(totals), dtype=torch.float32)
    size = _rows_at_once(model, tokens, batch_size)
    for start in track(range(0, len(totals), size), said):
        rows = torch.arange(start, min(start + size, len(totals)), device=model.device)
        prompt, c = rows // n_steps, coefficients[rows % n_steps]
        run = model.run(
            tokens.rows(prompt),
            read=parts.sites,
            write={site: stream[prompt] + c[:, None, None].to(stream) * added[prompt].to(stream)},
            vocabulary=read.tokens,
        )
        totals[rows] = read.of(run.logits[:, -1], prompt)
        if decompose:
            found[:, rows], own = parts.split(run, prompt, c)
            if of_neurons is not None and own is not None:
                of_neurons[:, rows] = own.to(of_neurons)
    gap = _check(found, totals, model) if decompose else 0.0

    def by_step(values: Tensor) -> Tensor:
        return values.reshape(*values.shape[:-1], n_prompts, n_steps).transpose(-1, -2)

    shaped = None if of_neurons is None else by_step(of_neurons)
    return Injection(coefficients, parts.names, by_step(found), by_step(totals), shaped, gap)


@torch.no_grad()
def slopes(
    model: TracedModel,
    tokens: Tokens,
    site: Site,
    added: Tensor,
    read: Readout,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What a little of the injection does by linear reckoning, ``[n_prompts]`` each, per unit of c.

    Returns:
        The derivative of the logit difference at c = 0, by the gradient; and the part of it that
        goes straight to the logits, v · W over the norm's scale, held at its value at c = 0.
    """
    last = Site("resid_post", model.n_layers - 1)
    whole, direct = [], []
    size = _rows_at_once(model, tokens, batch_size)
    for start in range(0, len(tokens), size):
        rows = slice(start, start + size)
        run = model.run(
            tokens.rows(rows),
            read=[last],
            gradient_of=partial(read.of, prompts=rows),
            gradient_at=[site],
            vocabulary=read.tokens,
        )
        own = added[rows].double()
        whole.append((run.gradient(site).double() * own).sum((1, 2)))
        scale = model.weights.norm_scale(None, run[last][:, -1].double())[:, 0]
        direct.append((own[:, -1] * read.direction[rows]).sum(-1) / scale)
    return torch.cat(whole), torch.cat(direct)


class _Parts:
    """What components write along the read-out: what an injection leaves alone, and what not."""

    def __init__(
        self,
        model: TracedModel,
        site: Site,
        read: Readout,
        added: Tensor,
        decompose: bool,
        neurons: int | None,
    ) -> None:
        assert site.layer is not None
        self.model, self.site, self.direction = model, site, read.direction
        self.names: tuple[str, ...] = ()
        self._neuron_layer = neurons
        self.neurons: Tensor | None = None
        self.sites: list[Site] = []
        if not decompose:
            return
        self.names = (*model.wiring.sources, "biases", "injection")
        self._first_head = site.layer + (site.kind != "resid_pre")
        self._first_mlp = site.layer + (site.kind == "resid_post")
        self._last = Site("resid_post", model.n_layers - 1)
        self.sites = [*self._writes(changed=True), self._last]
        outputs = [model.weights.heads(n, "o").double() for n in range(model.n_layers)]
        #: Output projections; and the read-out of what a head's z is, ``[n_prompts, n_heads,
        #: d_head]``, where no norm stands behind.
        self._outputs = outputs if model.architecture.attention_post_norm else []
        self._heads = [torch.einsum("hed,pd->phe", o, read.direction) for o in outputs]
        biases = [model.weights.attention_bias(n).double() for n in range(model.n_layers)]
        #: Numerators that no injection changes, ``[n_components, n_prompts]``, and what is added
        #: behind the norm.
        self._fixed = read.direction.new_zeros(len(self.names), len(read.direction))
        self._fixed[-2] = read.direction @ torch.stack(biases).sum(0)
        self._constant = read.bias
        self._along = (added * read.direction).sum(-1)
        if neurons is not None:
            self._out = next(model.weights.reading(Site("mlp_post", neurons))).to(read.direction)
            self.neurons = read.direction @ self._out.T
            self.sites.append(Site("mlp_post", neurons))
            self._mlp_bias = read.direction.new_zeros(len(read.direction))

    def begin(self, tokens: Tokens, batch_size: int | None) -> Tensor:
        """Run the prompts as they are, keep what stays, give the site, ``[n, pos, d_model]``."""
        model, streams = self.model, []
        sites = [self.site]
        if self.names:
            sites += [Site("resid_pre", 0), *self._writes(changed=False)]
        layer = self._neuron_layer
        if layer is not None:
            sites += [Site("mlp_post", layer), Site("mlp_out", layer)]
        size = _rows_at_once(model, tokens, batch_size)
        for start in range(0, len(tokens), size):
            rows = slice(start, start + size)
            run = model.run(tokens.rows(rows), read=sites, logits="none")
            streams.append(run[self.site])
            if self.names:
                prompts = torch.arange(len(tokens), device=model.device)[rows]
                own = run[Site("resid_pre", 0)][:, -1].double()
                self._fixed[0, prompts] = (own * self.direction[prompts]).sum(-1)
                for index, values in self._written(run, prompts, changed=False):
                    self._fixed[index, prompts] = values
                if layer is not None and self.neurons is not None:
                    # What the MLP writes beyond its neurons is its bias, the same in every row.
                    own = run[Site("mlp_out", layer)][:, -1].double() * self.direction[prompts]
                    self._mlp_bias[prompts] = own.sum(-1) - self._of_neurons(run, prompts).sum(-1)
        return torch.cat(streams)

    def split(self, run: Run, prompt: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attributions of one pass's rows, ``[n_components, n_rows]``, and of the neurons."""
        found = self._fixed[:, prompt].clone()
        for index, values in self._written(run, prompt, changed=True):
            found[index] = values
        found[-1] = c * self._along[prompt]
        scale = self.model.weights.norm_scale(None, run[self._last][:, -1].double())[:, 0]
        found /= scale
        found[-2] += self._constant[prompt]
        layer = self._neuron_layer
        if layer is None or self.neurons is None:
            return found, None
        own = self._of_neurons(run, prompt).T / scale
        whole = found[self.model.wiring.source_rows[f"m{layer}"]]
        rest = whole - self._mlp_bias[prompt] / scale - own.sum(0)
        _refuse(rest, own, f"the neurons of layer {layer}", f"what m{layer} writes", self.model)
        return found, own

    def _of_neurons(self, run: Run, prompt: Tensor) -> Tensor:
        """Numerators of the chosen layer's neurons, ``[n_rows, d_mlp]``."""
        layer, by_neuron = self._neuron_layer, self.neurons
        assert layer is not None
        assert by_neuron is not None
        post, by_neuron = run[Site("mlp_post", layer)][:, -1].double(), by_neuron[prompt]
        if self.model.architecture.mlp_post_norm:
            at = self._before(Site("mlp_out", layer), post @ self._out, prompt)
            by_neuron = at @ self._out.T
        return post * by_neuron

    def _before(self, site: Site, given: Tensor, prompt: Tensor) -> Tensor:
        """The read-out before the norm behind a module, at what that gives, ``[n_rows, d_model]``.

        A part of what it gives adds its product with this: gain times read-out over the scale.
        """
        direction = self.direction[prompt]
        return self.model.weights.shares(site, torch.stack([direction, given - direction]))[0]

    def _writes(self, *, changed: bool) -> Iterator[Site]:
        """The sites at which components write, after the injection or before it."""
        for layer in range(self.model.n_layers):
            for kind, first in (("z", self._first_head), ("mlp_out", self._first_mlp)):
                if (layer >= first) == changed:
                    yield Site(kind, layer)

    def _written(
        self, run: Run, prompt: Tensor, *, changed: bool
    ) -> Iterator[tuple[slice | int, Tensor]]:
        """Numerators of the components that a run read, with their places in ``names``."""
        wiring = self.model.wiring
        for site in self._writes(changed=changed):
            assert site.layer is not None
            first = wiring.first_source(site.layer)
            last = run[site][:, -1].double()
            if site.kind == "z":
                heads = self._heads[site.layer][prompt]
                if self._outputs:
                    output = self._outputs[site.layer]
                    given = last.flatten(1) @ output.flatten(0, 1)
                    at = self._before(Site("attn_out", site.layer), given, prompt)
                    heads = torch.einsum("hed,pd->phe", output, at)
                values = (last * heads).sum(-1).T
                yield slice(first, first + wiring.n_heads), values
            else:
                yield first + wiring.n_heads, (last * self.direction[prompt]).sum(-1)


def _spread(ids: Tensor, vocabulary: int) -> Tensor:
    """The mean of the logits of ``[batch, n]`` tokens, as weights ``[batch, vocabulary]``."""
    real = (ids >= 0).double()
    weights = real.new_zeros(len(ids), vocabulary)
    weights.scatter_add_(1, ids.clamp(min=0), real / real.sum(-1, keepdim=True).clamp(min=1))
    return weights


def _rows_at_once(model: TracedModel, tokens: Tokens, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise OptionError(f"batch size {asked} is too small; use 1 or more, or auto")
    if asked is not None:
        return asked
    # Each layer keeps z and the MLP's output, and its MLP is wider while it runs.
    kept = (2 * model.n_layers + 12) * tokens.ids.shape[1] * model.d_model
    return max(1, MEMORY // (kept * model.dtype.itemsize))


def _check(found: Tensor, totals: Tensor, model: TracedModel) -> float:
    """The largest gap between sum and total.

    Raises:
        QualityError: it is too large.
    """
    gap = found.sum(0) - totals
    _refuse(gap, found, "the components", "the model's logit difference", model)
    return float(gap.abs().max())


def _refuse(gap: Tensor, parts: Tensor, who: str, whole: str, model: TracedModel) -> None:
    largest = float(gap.abs().max())
    if not largest <= TOLERANCE * max(1.0, float(parts.abs().max())):
        dtype = str(model.dtype).removeprefix("torch.")
        raise QualityError(
            f"{who} sum to {whole} but for {largest:.2g} logits, in {dtype}: they do not explain "
            f"it; run in a wider type (--dtype float32), or the model adds what no component does"
        )
