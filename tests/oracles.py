"""Edge scores of Hugging Face GPT-2 written out from their definitions, slowly, to test against.

Nothing here is shared with the code under test: one component is computed at a time, every receiver
adds up its own residual, every edge is patched in a forward pass of its own. An edge is a tuple
``(source, target, port)``; ``port`` is ``"q"``, ``"k"``, ``"v"`` for heads and ``""`` otherwise.
A metric is a function of the logits after the last token, ``[batch, vocab] -> [batch]``.

Definitions: Hanna et al. 2024 (arXiv:2403.17806) and Syed et al. 2023 (arXiv:2310.10348). Scores
are metric(edge patched) - metric(clean), mean over pairs: negative where the edge helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

Edge = tuple[str, str, str]
MetricFunction = Callable[[Tensor], Tensor]

PORTS = ("q", "k", "v")


@dataclass(frozen=True)
class SplitRun:
    """One forward pass, component by component.

    Attributes:
        logits: ``[batch, pos, vocab]``.
        outputs: What each source writes to the residual stream, ``[batch, pos, d_model]``.
        inputs: What each (target, port) reads, before its LayerNorm, ``[batch, pos, d_model]``.
    """

    logits: Tensor
    outputs: dict[str, Tensor]
    inputs: dict[tuple[str, str], Tensor]


def edge_names(n_layers: int, n_heads: int) -> list[Edge]:
    """All edges of a sequential decoder: 479 for 4 layers of 4 heads, 32,491 for 12 of 12."""
    edges: list[Edge] = []
    before = ["input"]
    for layer in range(n_layers):
        heads = [f"a{layer}.h{head}" for head in range(n_heads)]
        edges += [(s, head, port) for head in heads for port in PORTS for s in before]
        before += heads
        edges += [(s, f"m{layer}", "") for s in before]
        before.append(f"m{layer}")
    return edges + [(s, "logits", "") for s in before]


def edges_of(module: nn.Module) -> list[Edge]:
    """All edges of this GPT-2."""
    config: Any = module.config
    return edge_names(config.n_layer, config.n_head)


def run(
    module: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    mixes: Mapping[Edge, Tensor] | None = None,
    pushes: Mapping[tuple[str, str], Tensor] | None = None,
    embedding: Tensor | None = None,
) -> SplitRun:
    """A forward pass in which every receiver reads a residual stream of its own.

    Args:
        module: A ``GPT2LMHeadModel`` in evaluation mode; its LayerNorms may be ``nn.Identity``.
        input_ids: ``[batch, pos]``, padded on the left.
        attention_mask: ``[batch, pos]``, 1 at real tokens; None where there is no padding.
        mixes: For some edges, what the target reads in place of the source's output.
        pushes: For some (target, port), a tensor added to what it reads.
        embedding: What ``input`` writes, in place of token plus position embedding.

    Raises:
        ValueError: ``mixes`` names an edge the model does not have.
    """
    mixes, pushes = dict(mixes or {}), dict(pushes or {})
    if unknown := set(mixes) - set(edges_of(module)):
        raise ValueError(f"edges {sorted(unknown)} do not exist in this model")
    gpt2: Any = module.transformer
    n_heads = gpt2.config.n_head
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    outputs = {"input": _embed(gpt2, input_ids, real) if embedding is None else embedding}
    inputs: dict[tuple[str, str], Tensor] = {}
    constant = torch.zeros_like(outputs["input"])

    def read(target: str, port: str) -> Tensor:
        total = constant
        for source, output in outputs.items():
            total = total + mixes.get((source, target, port), output)
        if (target, port) in pushes:
            total = total + pushes[target, port]
        inputs[target, port] = total
        return total

    for layer, block in enumerate(gpt2.h):
        written = {}
        for head in range(n_heads):
            name = f"a{layer}.h{head}"
            written[name] = _head_output(block, layer, head, [read(name, p) for p in PORTS], real)
        outputs.update(written)
        # The bias belongs to no head and is the same in every run, so it is nobody's effect.
        constant = constant + block.attn.c_proj.bias
        outputs[f"m{layer}"] = block.mlp(block.ln_2(read(f"m{layer}", "")))
    lm_head: Any = module.lm_head
    return SplitRun(lm_head(gpt2.ln_f(read("logits", ""))), outputs, inputs)


def _embed(gpt2: Any, input_ids: Tensor, real: Tensor) -> Tensor:
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    embedding: Tensor = gpt2.wte(input_ids) + gpt2.wpe(positions)
    return embedding


def _head_output(block: Any, layer: int, head: int, streams: list[Tensor], real: Tensor) -> Tensor:
    """What one head writes, without the output bias, when q, k and v read these three streams."""
    config = block.attn.config
    d_model, d_head = config.n_embd, config.n_embd // config.n_head
    weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
    q, k, v = (
        block.ln_1(stream) @ weight[:, start : start + d_head] + bias[start : start + d_head]
        for index, stream in enumerate(streams)
        for start in [index * d_model + head * d_head]
    )
    scores = q @ k.transpose(1, 2)
    if config.scale_attn_weights:
        scores = scores / math.sqrt(d_head)
    if config.scale_attn_by_inverse_layer_idx:
        scores = scores / (layer + 1)
    n_positions = real.shape[1]
    past = torch.ones(n_positions, n_positions, dtype=torch.bool, device=real.device).tril()
    # A padding token may look at itself: no real token reads it, and its row stays free of NaN.
    itself = torch.eye(n_positions, dtype=torch.bool, device=real.device)
    allowed = (past & real.bool()[:, None, :]) | itself
    pattern = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    written: Tensor = pattern @ v @ block.attn.c_proj.weight[head * d_head : (head + 1) * d_head]
    return written


def ablated_outputs(
    module: nn.Module,
    clean_ids: Tensor,
    corrupt_ids: Tensor | None,
    ablation: str = "counterfactual",
    attention_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a patched edge carries, per source, ``[batch, pos, d_model]``.

    Args:
        module: The model.
        clean_ids: ``[batch, pos]``.
        corrupt_ids: ``[batch, pos]``; only ``counterfactual`` looks at them.
        ablation: ``counterfactual`` is the source's output on the corrupt prompt, ``zero`` is 0,
            ``mean`` its mean over all clean prompts and their real positions.
        attention_mask: ``[batch, pos]``, of clean and corrupt prompts alike.

    Raises:
        ValueError: ``ablation`` is none of these, or there are no corrupt prompts to read.
    """
    if ablation == "counterfactual":
        if corrupt_ids is None:
            raise ValueError("ablation 'counterfactual' needs corrupt_ids; give them or use zero")
        return run(module, corrupt_ids, attention_mask).outputs
    clean = run(module, clean_ids, attention_mask).outputs
    if ablation == "zero":
        return {source: torch.zeros_like(output) for source, output in clean.items()}
    if ablation == "mean":
        real = torch.ones_like(clean_ids) if attention_mask is None else attention_mask
        return {s: output[real.bool()].mean(0).expand_as(output) for s, output in clean.items()}
    raise ValueError(f"ablation {ablation!r} does not exist; choose counterfactual, zero or mean")


@torch.no_grad()
def patched_metric(
    module: nn.Module,
    clean_ids: Tensor,
    corrupt_ids: Tensor | None,
    metric: MetricFunction,
    edges: Iterable[Edge],
    *,
    ablation: str = "counterfactual",
    fraction: float = 1.0,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The metric of each clean prompt with all ``edges`` patched at once, ``[batch]``.

    A patched edge carries ``clean + fraction * (ablated - clean)``, both as recorded in their own
    unpatched runs; everything else is recomputed.
    """
    clean = run(module, clean_ids, attention_mask).outputs
    ablated = ablated_outputs(module, clean_ids, corrupt_ids, ablation, attention_mask)
    mixes = {
        (source, target, port): clean[source] + fraction * (ablated[source] - clean[source])
        for source, target, port in edges
    }
    return metric(run(module, clean_ids, attention_mask, mixes=mixes).logits[:, -1])


def exact_effects(
    module: nn.Module,
    clean_ids: Tensor,
    corrupt_ids: Tensor | None,
    metric: MetricFunction,
    edges: Iterable[Edge] | None = None,
    ablation: str = "counterfactual",
    *,
    attention_mask: Tensor | None = None,
) -> dict[Edge, float]:
    """metric(this one edge patched) - metric(clean), mean over pairs, one forward per edge."""
    with torch.no_grad():
        clean = run(module, clean_ids, attention_mask)
        ablated = ablated_outputs(module, clean_ids, corrupt_ids, ablation, attention_mask)
        reference = metric(clean.logits[:, -1])
        effects = {}
        for edge in edges_of(module) if edges is None else edges:
            patched = run(module, clean_ids, attention_mask, mixes={edge: ablated[edge[0]]})
            effects[edge] = float((metric(patched.logits[:, -1]) - reference).mean())
    return effects


def receiver_gradients(
    module: nn.Module,
    input_ids: Tensor,
    metric: MetricFunction,
    *,
    attention_mask: Tensor | None = None,
    embedding: Tensor | None = None,
) -> dict[tuple[str, str], Tensor]:
    """d metric / d what each (target, port) reads, ``[batch, pos, d_model]``, each pair for itself.

    LayerNorms are differentiated. The model's parameters collect no gradient.
    """
    with torch.no_grad():
        plain = run(module, input_ids, attention_mask, embedding=embedding)
    pushes = {key: torch.zeros_like(x).requires_grad_() for key, x in plain.inputs.items()}
    with torch.enable_grad():
        pushed = run(module, input_ids, attention_mask, pushes=pushes, embedding=embedding)
        total = metric(pushed.logits[:, -1]).sum()
    gradients = torch.autograd.grad(total, list(pushes.values()))
    return dict(zip(pushes, gradients, strict=True))


def eap(
    module: nn.Module,
    clean_ids: Tensor,
    corrupt_ids: Tensor | None,
    metric: MetricFunction,
    edges: Iterable[Edge] | None = None,
    ablation: str = "counterfactual",
    *,
    attention_mask: Tensor | None = None,
) -> dict[Edge, float]:
    """Edge attribution patching: (ablated - clean) . gradient at the clean run, mean over pairs."""
    gradients = receiver_gradients(module, clean_ids, metric, attention_mask=attention_mask)
    return _scores(
        module, clean_ids, corrupt_ids, gradients, edges, ablation, attention_mask=attention_mask
    )


def eap_ig(
    module: nn.Module,
    clean_ids: Tensor,
    corrupt_ids: Tensor | None,
    metric: MetricFunction,
    edges: Iterable[Edge] | None = None,
    ablation: str = "counterfactual",
    *,
    steps: int = 5,
    rule: str = "midpoint",
    attention_mask: Tensor | None = None,
) -> dict[Edge, float]:
    """EAP with the gradient averaged over inputs between the ablated and the clean one.

    In the run at ``alpha``, ``input`` writes ``ablated + alpha * (clean - ablated)``. Rule ``left``
    takes alpha = k / steps, as the code of Hanna et al. does; ``midpoint`` (k + 1/2) / steps.

    Raises:
        ValueError: ``rule`` is neither.
    """
    shifts = {"left": 0.0, "midpoint": 0.5}
    if rule not in shifts:
        raise ValueError(f"rule {rule!r} does not exist; choose left or midpoint")
    with torch.no_grad():
        start = ablated_outputs(module, clean_ids, corrupt_ids, ablation, attention_mask)["input"]
        end = run(module, clean_ids, attention_mask).outputs["input"]
    average: dict[tuple[str, str], Tensor] = {}
    for step in range(steps):
        embedding = start + (step + shifts[rule]) / steps * (end - start)
        gradients = receiver_gradients(
            module, clean_ids, metric, attention_mask=attention_mask, embedding=embedding
        )
        for key, gradient in gradients.items():
            average[key] = average.get(key, 0) + gradient / steps
    return _scores(
        module, clean_ids, corrupt_ids, average, edges, ablation, attention_mask=attention_mask
    )


@torch.no_grad()
def _scores(
    module: nn.Module,
    clean_ids: Tensor,
    corrupt_ids: Tensor | None,
    gradients: Mapping[tuple[str, str], Tensor],
    edges: Iterable[Edge] | None,
    ablation: str,
    *,
    attention_mask: Tensor | None,
) -> dict[Edge, float]:
    clean = run(module, clean_ids, attention_mask).outputs
    ablated = ablated_outputs(module, clean_ids, corrupt_ids, ablation, attention_mask)
    scores = {}
    for source, target, port in edges_of(module) if edges is None else edges:
        product = (ablated[source] - clean[source]) * gradients[target, port]
        scores[source, target, port] = float(product.sum(dim=(1, 2)).mean())
    return scores


def outgoing(scores: Mapping[Edge, float], source: str) -> float:
    """Sum of the scores of the edges out of one component.

    For gradient scores this is the component's own attribution: (ablated - clean) . d metric / d
    output. For ``input`` with EAP-IG it tends to metric(ablated input) - metric(clean).
    """
    return math.fsum(score for edge, score in scores.items() if edge[0] == source)


def incoming(scores: Mapping[Edge, float], target: str, port: str = "") -> float:
    """Sum of the scores of the edges into one port.

    Into ``logits``, for a linear metric and no final LayerNorm, any method's sum is
    metric(corrupt) - metric(clean).
    """
    return math.fsum(score for edge, score in scores.items() if edge[1:] == (target, port))


def random_gpt2(
    n_layers: int = 2,
    n_heads: int = 2,
    d_model: int = 16,
    *,
    vocab: int = 40,
    n_positions: int = 16,
    layer_norm: bool = True,
    mlp: bool = True,
    activation: str = "gelu_new",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> GPT2LMHeadModel:
    """A small random ``GPT2LMHeadModel`` that is far from linear, with no bias at 0 or gain at 1.

    ``layer_norm=False`` makes every LayerNorm an ``nn.Identity``, ``mlp=False`` every MLP parameter
    0, ``activation="linear"`` the MLPs linear. The global random generator is left as it was.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    settings |= {"n_layer": n_layers, "n_head": n_heads, "n_embd": d_model}
    settings |= {"vocab_size": vocab, "n_positions": n_positions, "tie_word_embeddings": False}
    settings |= {"activation_function": activation, "attn_implementation": "eager"}
    config = GPT2Config(**settings, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module: Any = GPT2LMHeadModel(config)
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            # The default initialization is so small that attention is uniform and GELU is linear.
            wide = parameter.ndim > 1
            parameter.copy_(1.5 * noise / d_model**0.5 if wide else parameter + 0.2 * noise)
        for block in module.transformer.h:
            if not layer_norm:
                block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
            for parameter in [] if mlp else block.mlp.parameters():
                parameter.zero_()
        if not layer_norm:
            module.transformer.ln_f = nn.Identity()
    prepared: GPT2LMHeadModel = module.to(dtype).eval()
    return prepared
