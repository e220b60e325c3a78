"""A plain Hugging Face model under forward hooks: what each component writes and reads, changed.

The stock model runs, hooks change what a source writes or what a receiver reads, and everything
after it is recomputed by the stock model. Nothing here is shared with the code under test, nor with
:mod:`oracles`, which computes a model component by component. Sequential blocks (GPT-2) and
parallel ones (GPT-NeoX) are known. An edge is ``(source, target, port)``, as in :mod:`oracles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Edge = tuple[str, str, str]
Receiver = tuple[str, str]

PORTS = "qkv"


class Plain:
    """Where a Hugging Face model keeps its parts."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        config: Any = module.config
        self.parallel = config.model_type == "gpt_neox"
        self.n_layers, self.n_heads = config.num_hidden_layers, config.num_attention_heads
        self.d_head = config.hidden_size // self.n_heads
        body: Any = module.gpt_neox if self.parallel else module.transformer
        self.blocks = body.layers if self.parallel else body.h
        # What it gives is the first residual stream.
        self.embedding = body.emb_dropout if self.parallel else body.drop
        self.final_norm = body.final_layer_norm if self.parallel else body.ln_f
        if self.parallel and not config.use_parallel_residual:
            raise ValueError("sequential GPT-NeoX is not known here; use parallel residuals")

    def norms(self, layer: int) -> tuple[Any, Any]:
        block = self.blocks[layer]
        if self.parallel:
            return block.input_layernorm, block.post_attention_layernorm
        return block.ln_1, block.ln_2

    def projection(self, layer: int) -> Any:
        """The module that makes q, k and v."""
        block = self.blocks[layer]
        return block.attention.query_key_value if self.parallel else block.attn.c_attn

    def columns(self, head: int, port: str) -> slice:
        """Where its output has one head's q, k or v."""
        number = PORTS.index(port)
        place = 3 * head + number if self.parallel else number * self.n_heads + head
        return slice(place * self.d_head, (place + 1) * self.d_head)

    def output_projection(self, layer: int) -> Any:
        block = self.blocks[layer]
        return block.attention.dense if self.parallel else block.attn.c_proj

    def written_by(self, layer: int, z: Tensor) -> list[Tensor]:
        """What each head adds to the stream; the bias belongs to none."""
        weight = self.output_projection(layer).weight
        rows = (weight.T if self.parallel else weight).split(self.d_head)
        return [part @ row for part, row in zip(z.split(self.d_head, -1), rows, strict=True)]

    def heads(self, layer: int) -> list[str]:
        return [f"a{layer}.h{head}" for head in range(self.n_heads)]

    def receivers(self) -> Iterator[tuple[Receiver, list[str]]]:
        """Each receiver in forward order, with the sources that it reads."""
        before = ["input"]
        for layer in range(self.n_layers):
            heads = self.heads(layer)
            yield from (((head, port), before) for head in heads for port in PORTS)
            yield (f"m{layer}", ""), before if self.parallel else before + heads
            before = [*before, *heads, f"m{layer}"]
        yield ("logits", ""), before

    def edges(self) -> list[Edge]:
        return [(source, *receiver) for receiver, heard in self.receivers() for source in heard]


@dataclass
class Pass:
    """One forward pass of the stock model under hooks.

    Attributes:
        writes: For some sources, what they write in place of their output.
        mixes: For some edges, what the target reads in place of the source's output.
        pushes: For some (target, port), what is added to the stream that it reads.
        reads: For some (target, port), the whole stream that it reads.
        adds: For some (kind, layer) of residual sites, what is added there.
        outputs: What each source wrote, ``[batch, pos, d_model]``.
        inputs: What each (target, port) read, before its norm, ``[batch, pos, d_model]``.
        logits: After the last token, ``[batch, vocab]``.
    """

    model: Plain
    writes: Mapping[str, Tensor] = field(default_factory=dict)
    mixes: Mapping[Edge, Tensor] = field(default_factory=dict)
    pushes: Mapping[Receiver, Tensor] = field(default_factory=dict)
    reads: Mapping[Receiver, Tensor] = field(default_factory=dict)
    adds: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[Receiver, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.heard = dict(self.model.receivers())
        known = {*self.model.edges(), *self.heard, *self.heard[("logits", "")]}
        if unknown := {*self.writes, *self.mixes, *self.pushes, *self.reads} - known:
            raise ValueError(f"{unknown} do not exist in this model")

    @torch.no_grad()
    def run(self, ids: Tensor, mask: Tensor) -> Pass:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        with self._hooks():
            done = self.model.module(
                ids, attention_mask=_additive(mask), position_ids=positions, use_cache=False
            )
        self.logits = done.logits[:, -1]
        return self

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        model = self.model
        hooks = [
            (model.embedding, lambda module, given, output: self._written("input", output)),
        ]
        before = [(model.final_norm, lambda module, given: self._read("logits", "", given[0]))]
        for layer, block in enumerate(model.blocks):
            streams: dict[int, Tensor] = {}
            norms = model.norms(layer)
            before += [(norm, _keep(streams, number)) for number, norm in enumerate(norms)]
            before.append((block.mlp, self._before_mlp(layer, streams)))
            before.append((block, self._site("resid_pre", layer)))
            hooks.append((model.projection(layer), self._project(layer, streams)))
            hooks.append((model.output_projection(layer), self._attend(layer)))
            hooks.append((block.mlp, self._after_mlp(layer)))
            hooks.append((block, self._site("resid_post", layer)))
        handles = [module.register_forward_pre_hook(hook) for module, hook in before]
        handles += [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _written(self, source: str, output: Tensor) -> Tensor:
        self.outputs[source] = self.writes.get(source, output)
        return self.outputs[source]

    def _read(self, target: str, port: str, stream: Tensor) -> Tensor:
        for source in self.heard[target, port]:
            mixed = self.mixes.get((source, target, port))
            if mixed is not None:
                stream = stream + (mixed - self.outputs[source])
        if (target, port) in self.pushes:
            stream = stream + self.pushes[target, port]
        self.inputs[target, port] = self.reads.get((target, port), stream)
        return self.inputs[target, port]

    def _project(self, layer: int, streams: dict[int, Tensor]) -> Callable[..., Tensor]:
        def hook(projection: Any, _: Any, output: Tensor) -> Tensor:
            output, norm = output.clone(), self.model.norms(layer)[0]
            for head, name in enumerate(self.model.heads(layer)):
                for port in PORTS:
                    stream = self._read(name, port, streams[0])
                    if stream is not streams[0]:
                        columns = self.model.columns(head, port)
                        # forward: a call would come back to this hook.
                        answer = projection.forward(norm.forward(stream))
                        output[..., columns] = answer[..., columns]
            return output

        return hook

    def _attend(self, layer: int) -> Callable[..., Tensor]:
        def hook(_: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
            written = self.model.written_by(layer, arguments[0])
            for name, own in zip(self.model.heads(layer), written, strict=True):
                output = output + (self._written(name, own) - own)
            return output + self.adds.get(("resid_mid", layer), 0)

        return hook

    def _before_mlp(self, layer: int, streams: dict[int, Tensor]) -> Callable[..., Any]:
        norm = self.model.norms(layer)[1]
        return lambda module, given: (norm.forward(self._read(f"m{layer}", "", streams[1])),)

    def _after_mlp(self, layer: int) -> Callable[..., Tensor]:
        return lambda module, given, output: self._written(f"m{layer}", output)

    def _site(self, kind: str, layer: int) -> Callable[..., Any]:
        def hook(_: Any, *given: Any) -> Any:
            # Before the block: its arguments; behind it: those and what it gives.
            change, value = self.adds.get((kind, layer)), given[-1]
            if change is None:
                return None
            return (value[0] + change, *value[1:]) if isinstance(value, tuple) else value + change

        return hook


def _additive(mask: Tensor) -> Tensor:
    """What is added to attention scores, ``[batch, 1, pos, pos]``.

    A padding token looks at itself, so that its row stays free of NaN. GPT-NeoX adds in float64 and
    then takes the softmax in float32, in which float64's smallest number is no number.
    """
    n_positions = mask.shape[1]
    square = torch.ones(n_positions, n_positions, dtype=torch.bool)
    itself = torch.eye(n_positions, dtype=torch.bool)
    allowed = (square.tril() & mask.bool()[:, None, None, :]) | itself
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def _keep(streams: dict[int, Tensor], number: int) -> Callable[..., None]:
    def hook(_: Any, arguments: tuple[Tensor, ...]) -> None:
        streams[number] = arguments[0]

    return hook


def random_neox(
    n_layers: int = 2,
    n_heads: int = 2,
    d_model: int = 16,
    *,
    vocab: int = 40,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> nn.Module:
    """A small random GPT-NeoX with parallel blocks, as far from linear as ``random_gpt2``."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=2 * d_model,
        max_position_embeddings=16,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = GPTNeoXForCausalLM(config)
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            wide = parameter.ndim > 1
            parameter.copy_(1.5 * noise / d_model**0.5 if wide else parameter + 0.2 * noise)
    prepared: nn.Module = module.to(dtype).eval()
    return prepared
