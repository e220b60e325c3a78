"""The self-check of a traced model: what must hold before any number from it is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuitlab.attending import Attention
from circuitlab.check_runs import CheckRuns
from circuitlab.errors import ModelError, NumericsError, QualityError, RemoteError
from circuitlab.progress import tell
from circuitlab.prompts import Tokens
from circuitlab.sites import Site
from circuitlab.wiring import PORTS

if TYPE_CHECKING:
    from circuitlab.model import TracedModel

#: Largest difference, as a multiple of the type's rounding and of the values' size.
ROUNDINGS = 256
#: Bytes of weights up to which all of a host's model are fetched to be checked.
FETCHED = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that holds or does not.

    Attributes:
        name: What was compared.
        difference: Largest difference, relative to the largest value compared.
        tolerance: Largest difference allowed.
    """

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; a NaN is not."""
        return self.difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class Probe:
    """Random prompts, one of them padded, and what the plain module says to them."""

    module: nn.Module
    tokens: Tokens
    answer: Callable[[], Tensor]

    @property
    def logits(self) -> Tensor:
        """``[2, pos, vocab]``."""
        return self.answer()


@torch.no_grad()
def probe(module: nn.Module) -> Probe:
    """Run a plain Hugging Face module on two short random prompts, before it is wrapped.

    Raises:
        ModelError: the module cannot be called the way causal language models are.
    """
    config: Any = module.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    length = min([6, *(int(n) for n in longest if n)])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(config.vocab_size), (2, length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, : length // 2] = False
    tokens = Tokens(ids * mask, mask).to(next(module.parameters()).device)
    inputs = {
        "input_ids": tokens.ids,
        "attention_mask": tokens.mask.to(torch.int64),
        "position_ids": tokens.position_ids,
        "use_cache": False,
    }
    begin: Any = getattr(module, "begin", None)
    if begin is not None:  # on a host: it goes with the first runs
        return Probe(module, tokens, begin(**inputs))
    try:
        logits = module(**inputs).logits
    except (TypeError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{type(module).__name__} cannot be run as a causal language model: {error}; "
            f"load it with AutoModelForCausalLM"
        ) from error
    return Probe(module, tokens, lambda: logits)


def run_checks(model: TracedModel, plain: Probe) -> list[Check]:
    """Compare the traced model with the plain one, and with its own description.

    Checks: the same logits; the sources and constants sum to the residual stream; q, k and v are
    its projections; heads carry nothing but their values; MLPs read the stream they are said to
    and write what their hidden layers are projected to; writing what was read changes nothing; nor
    does leaving out blocks, attention and logits that are not needed; a padded prompt gives its own
    logits. Where the description says how positions come in: the stream begins with the embeddings,
    and heads attend as their queries and keys say. Logits are read off the last stream.

    Raises:
        QualityError: the description of the model does not fit it, so that it cannot be traced.
    """
    try:
        runs = CheckRuns(model, plain.tokens)
        if model.architecture.blocks_only:
            return _compare_blocks(model, plain, runs)
        near = not _too_far(model)
        runs.begin("whole", "alone", "valueless", "inner", *(runs.closer if near else ()))
        checks = _compare(model, plain, runs)
        # Where the description is wrong at large, what looks closer fails less clearly.
        if all(check.passed for check in checks):
            checks.append(_shortened(model, plain, runs))
            if near:
                checks += _hidden_layers(model, runs)
                checks += [*_positions(model, plain, runs), *_unembedded(model, plain, runs)]
        return checks
    except (torch.OutOfMemoryError, NumericsError, RemoteError):
        raise
    except Exception as error:  # modules that are not what they are said to be fail in every way
        fact = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise QualityError(
            f"model {model.name!r} cannot be traced as {model.architecture.family}: {fact}; "
            f"what a plugin's adapt_architecture says of it does not fit"
        ) from error


def _too_far(model: TracedModel) -> bool:
    """Whether a host's weights are too many to be fetched for a check; that is told."""
    size = model.n_parameters * model.dtype.itemsize
    if not model.remote or size <= FETCHED:
        return False
    tell(
        [
            f"the self-check of {model.name!r} leaves out its embeddings, MLPs and unembedding: "
            f"the host has {size / 2**30:.1f} GiB of weights, too many to fetch"
        ]
    )
    return True


def _compare(model: TracedModel, plain: Probe, runs: CheckRuns) -> list[Check]:
    layers, last, run = runs.layers, runs.last, runs.whole
    ports = [Site(k, n) for n in layers for k in PORTS]
    mask = plain.tokens.mask
    runs.begin("identity", "short")
    identity, alone = runs.identity.logits, runs.alone.logits
    real = plain.logits[mask]
    projected = [model.weights.projected(s, run[Site("resid_pre", s.layer)])[mask] for s in ports]
    return [
        _check("logits equal plain Hugging Face", run.logits[mask], real, model),
        _check(
            "components sum to the residual stream", _summed(model, run), run[last], model, mask
        ),
        _check(
            "q, k and v are projected from the residual stream",
            torch.cat([value.flatten(1) for value in projected], 1),
            torch.cat([run[site][mask].flatten(1) for site in ports], 1),
            model,
        ),
        _heads_carry_values(model, plain.tokens, runs),
        _check(
            "MLPs read the stream they are said to read",
            torch.stack([run[Site("mlp_in", n)] for n in layers])[:, mask],
            torch.stack([_heard(model, run, n) for n in layers])[:, mask],
            model,
        ),
        _check("writing what was read changes nothing", identity[mask], real, model),
        _check("padding changes nothing", alone[0], plain.logits[1][mask[1]], model),
    ]


def _compare_blocks(model: TracedModel, plain: Probe, runs: CheckRuns) -> list[Check]:
    """What can be compared of a model of which only the blocks are known."""
    runs.begin("whole", "alone")
    layers, mask, real = runs.layers, plain.tokens.mask, plain.logits[plain.tokens.mask]
    run, tokens = runs.whole, runs.two
    runs.begin("identity", "ends")
    identity, alone = runs.identity.logits, runs.alone.logits
    short = [end.logits[:, -1] for end in runs.ends]
    wanted = plain.logits[:, -1, tokens].expand(model.n_layers, -1, -1)
    handed = [run[Site("resid_post", n)] for n in layers[:-1]]
    return [
        _check("logits equal plain Hugging Face", run.logits[mask], real, model),
        *(
            _check(f"block {n + 1} reads what block {n} hands on", given, run[later], model, mask)
            for n, (given, later) in enumerate(
                zip(handed, (Site("resid_pre", n) for n in layers[1:]), strict=True)
            )
        ),
        _check("writing what was read changes nothing", identity[mask], real, model),
        _check("padding changes nothing", alone[0], plain.logits[1][mask[1]], model),
        _check("leaving out blocks changes nothing", torch.stack(short), wanted, model),
    ]


def _heads_carry_values(model: TracedModel, tokens: Tokens, runs: CheckRuns) -> Check:
    """Without values, nothing is left of what the heads write."""
    heads = [Site("z", n) for n in runs.layers]
    whole = torch.stack([runs.whole[head] for head in heads])[:, tokens.mask]
    rest = torch.stack([runs.valueless[head] for head in heads])[:, tokens.mask]
    return _check("heads carry nothing but their values", whole - rest, whole, model)


def _shortened(model: TracedModel, plain: Probe, runs: CheckRuns) -> Check:
    """Leaving out blocks, an attention and all logits but two gives these two."""
    name = "leaving out what is not needed changes nothing"
    wanted = plain.logits[:, -1, runs.two]
    return _check(name, runs.short.logits[:, -1], wanted, model)


def require(model: TracedModel, checks: list[Check]) -> None:
    """Refuse a model that fails a check.

    Raises:
        QualityError: names each failed check, its difference and tolerance.
        ModelError: the same, where only the blocks of the model are known.
    """
    failed = [c for c in checks if not c.passed]
    if failed:
        facts = "; ".join(
            f"{c.name}: off by {c.difference:.2g}, at most {c.tolerance:.2g}" for c in failed
        )
        kind = ModelError if model.architecture.blocks_only else QualityError
        raise kind(
            f"model {model.name!r} as traced ({model.architecture.family}, {model.dtype}) fails "
            f"its self-check: {facts}; no score from it could be trusted"
        )


def _summed(model: TracedModel, run: Any) -> Tensor:
    """Sum of all sources and of the constants attention adds to its heads (the output bias)."""
    total = model.source_outputs(run).sum(0)
    for layer in range(model.n_layers):
        total += model.weights.attention_bias(layer)
    return total


def _hidden_layers(model: TracedModel, runs: CheckRuns) -> list[Check]:
    """What MLPs write is their hidden layers times their output projections, and a constant."""
    if not model.architecture.mlp_output_projection:
        return []
    layers, tokens, run = runs.layers, runs.tokens, runs.hidden
    weights = [next(model.weights.reading(Site("mlp_post", n))) for n in layers]
    hidden = [run[Site("mlp_post", n)][tokens.mask].double() for n in layers]
    written = torch.stack([run[Site("mlp_out", n)] for n in layers])[:, tokens.mask].double()
    expected = torch.stack([value @ weight for value, weight in zip(hidden, weights, strict=True)])
    if model.architecture.mlp_post_norm:
        expected = torch.cat(
            [model.weights.shares(Site("mlp_out", n), expected[n : n + 1]) for n in layers]
        )
    else:
        written, expected = written - written[:, :1], expected - expected[:, :1]
    return [
        _check("MLPs write what their hidden layers are projected to", written, expected, model)
    ]


@torch.no_grad()
def _positions(model: TracedModel, plain: Probe, runs: CheckRuns) -> list[Check]:
    """Embeddings and attention, by what the description says of positions; [] if it says nothing.

    A window that is longer than the prompts leaves nothing to check.
    """
    a, tokens = model.architecture, plain.tokens
    if not (a.position_embed or a.rotary):
        return []
    layers, start, run = runs.layers, Site("resid_pre", 0), runs.begun
    begun, learned = run[Site("embed")] * a.embed_scale, model.weights.positions(model.dtype)
    if learned is not None:
        begun = begun + learned[tokens.position_ids]
    attention = Attention(plain.module, a)
    dtype = torch.promote_types(model.dtype, torch.float32)
    attended = []
    for layer in layers:
        ports = [attention.normed(layer, p, run[Site(p, layer)].to(dtype)) for p in PORTS]
        attended.append(attention.z(layer, tokens, *ports))
    z = torch.stack([run[Site("z", n)] for n in layers])
    mask = tokens.mask
    return [
        _check("the stream begins with the embeddings", begun, run[start], model, mask),
        _check(
            "heads attend as their queries and keys say",
            torch.stack(attended)[:, mask],
            z[:, mask],
            model,
        ),
    ]


def _unembedded(model: TracedModel, plain: Probe, runs: CheckRuns) -> list[Check]:
    """Logits of two tokens from the last stream; [] where the last norm is no known one."""
    stream, tokens = runs.ended[runs.last][plain.tokens.mask], runs.two
    dtype = torch.promote_types(model.dtype, torch.float32)
    stream = stream.to(dtype)
    try:
        weight, bias = model.weights.unembedding(dtype, tokens)
        logits = stream / model.weights.norm_scale(None, stream) @ weight + bias
    except ModelError:
        return []
    if cap := model.architecture.logit_softcap:
        logits = cap * torch.tanh(logits / cap)
    real = plain.logits[plain.tokens.mask][:, tokens]
    return [_check("logits are read off the last stream", logits, real, model)]


def _heard(model: TracedModel, run: Any, layer: int) -> Tensor:
    """The stream that the MLP of a layer reads, by the model's description."""
    stream: Tensor = run[Site("resid_pre", layer)]
    return stream if model.architecture.parallel else stream + run[Site("attn_out", layer)]


def _check(
    name: str, value: Tensor, expected: Tensor, model: TracedModel, mask: Tensor | None = None
) -> Check:
    if mask is not None:
        value, expected = value[mask], expected[mask]
    value, expected = value.double(), expected.double()
    scale = float(expected.abs().max().clamp(min=1e-30))
    tolerance = ROUNDINGS * torch.finfo(model.dtype).eps
    return Check(name, float((value - expected).abs().max()) / scale, tolerance)
