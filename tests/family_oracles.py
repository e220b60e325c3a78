"""Any family's stock Hugging Face model as a residual graph: every receiver reads its own stream.

One component at a time is computed, by the stock model itself: it runs with what that component
reads put in by hooks, and stops behind it. So each head has queries, keys and values of its own,
also where the model shares them or norms them together, and nothing here knows what attention, a
norm or an MLP is. Where a norm stands behind the attention, a head writes its share of what the
norm gives: its part of the sum times what the norm multiplies each number of that sum by.

Edges are those of :mod:`oracles`. Many changed runs are rows of one batch; autograd goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PORTS = "qkv"

Receiver = tuple[str, str]


@dataclass(frozen=True)
class SplitRun:
    """``logits [rows, batch, vocab]`` after the last token, what each source wrote, and what each
    receiver read: ``[rows * batch, pos, d_model]``.
    """

    logits: Tensor
    outputs: dict[str, Tensor]
    inputs: dict[Receiver, Tensor]


class _Reached(Exception):
    """The value was reached; the rest of the model need not run."""


class SplitModel:
    """A stock model whose components can be computed one by one.

    Attributes:
        sources: Names in forward order.
        receivers: Each (target, port) in forward order, with the number of sources that it reads.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        config: Any = module.config
        kind = config.model_type
        neox = kind == "gpt_neox"
        body: Any = module.gpt_neox if neox else module.model
        self.blocks, self.final_norm = body.layers, body.final_layer_norm if neox else body.norm
        self.n_layers, self.n_heads = len(self.blocks), config.num_attention_heads
        self.n_kv = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_head = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads
        self.parallel = neox and config.use_parallel_residual
        self.behind = kind in ("gemma2", "gemma3_text", "olmo2")
        self.before = kind != "olmo2"
        self.mlp_norm = "pre_feedforward_layernorm" if self.behind else "post_attention_layernorm"
        self.joint = {"gpt_neox": "query_key_value", "phi3": "qkv_proj"}.get(kind)
        self.sources, self.receivers = self._graph()

    def _graph(self) -> tuple[list[str], dict[Receiver, int]]:
        sources, receivers = ["input"], {}
        for layer in range(self.n_layers):
            heads = [f"a{layer}.h{head}" for head in range(self.n_heads)]
            before = len(sources)
            receivers |= {(head, port): before for port in PORTS for head in heads}
            receivers[f"m{layer}", ""] = before if self.parallel else before + self.n_heads
            sources += [*heads, f"m{layer}"]
        return sources, {**receivers, ("logits", ""): len(sources)}

    def run(
        self,
        ids: Tensor,
        mask: Tensor,
        *,
        other: Mapping[str, Tensor] | None = None,
        patched: Tensor | None = None,
        pushes: Mapping[Receiver, Tensor] | None = None,
        reads: Mapping[Receiver, Tensor] | None = None,
        embedding: Tensor | None = None,
    ) -> SplitRun:
        """A forward pass for each row of ``patched``.

        Args:
            ids: ``[batch, pos]``, padded on the left.
            mask: ``[batch, pos]``, 1 at real tokens.
            other: What patched edges carry, by source, ``[batch, pos, d_model]``.
            patched: Which edges do, bool ``[rows, sources, receivers]``; None for none, in one row.
            pushes: What is added to the stream that a receiver reads, ``[rows * batch, pos,
                d_model]``.
            reads: The whole stream that a receiver reads, same shape.
            embedding: What ``input`` writes, ``[batch, pos, d_model]``.
        """
        rows = 1 if patched is None else len(patched)
        ask = _Asker(self, ids.repeat(rows, 1), mask.repeat(rows, 1))
        first = ask.first_stream() if embedding is None else embedding.repeat(rows, 1, 1)
        outputs, inputs = {"input": first}, dict(reads or {})
        constant = torch.zeros_like(outputs["input"])
        numbers = {receiver: number for number, receiver in enumerate(self.receivers)}

        def read(target: str, port: str = "") -> Tensor:
            if (target, port) in inputs:
                return inputs[target, port]
            total = constant
            for number, source in enumerate(self.sources[: self.receivers[target, port]]):
                value = outputs[source]
                if patched is not None and other is not None:
                    chosen = patched[:, number, numbers[target, port]].repeat_interleave(len(ids))
                    carried = other[source].repeat(rows, 1, 1)
                    value = torch.where(chosen[:, None, None], carried, value)
                total = total + value
            inputs[target, port] = total if pushes is None else total + pushes[target, port]
            return inputs[target, port]

        for layer in range(self.n_layers):
            z = [
                ask.head(layer, head, {p: read(f"a{layer}.h{head}", p) for p in PORTS})
                for head in range(self.n_heads)
            ]
            if self.parallel:
                read(f"m{layer}")
            written, bias = self.written(layer, z)
            outputs |= {f"a{layer}.h{head}": part for head, part in enumerate(written)}
            constant = constant + bias
            outputs[f"m{layer}"] = ask.mlp(layer, read(f"m{layer}"))
        logits = ask.logits(read("logits"))
        return SplitRun(logits.view(rows, len(ids), -1), outputs, inputs)

    def attention(self, layer: int) -> Any:
        block = self.blocks[layer]
        return block.attention if hasattr(block, "attention") else block.self_attn

    def output_projection(self, layer: int) -> Any:
        attention = self.attention(layer)
        return attention.dense if hasattr(attention, "dense") else attention.o_proj

    def written(self, layer: int, z: list[Tensor]) -> tuple[list[Tensor], Tensor | float]:
        """What each head adds to the stream, and what belongs to none."""
        projection = self.output_projection(layer)
        weights = projection.weight.T.split(self.d_head)
        parts = [own @ weight for own, weight in zip(z, weights, strict=True)]
        if not self.behind:
            return parts, 0.0 if projection.bias is None else projection.bias
        total = torch.stack(parts).sum(0)
        factor = self.blocks[layer].post_attention_layernorm(total) / total
        return [part * factor for part in parts], 0.0

    def projections(self, layer: int) -> dict[Any, str]:
        """The modules that make q, k and v, each with the ports that it makes."""
        attention = self.attention(layer)
        if self.joint is None:
            return {getattr(attention, f"{port}_proj"): port for port in PORTS}
        return {getattr(attention, self.joint): PORTS}

    def columns(self, port: str) -> Tensor:
        """Which columns of a joint projection are a port's."""
        sizes = {"q": self.n_heads, "k": self.n_kv, "v": self.n_kv}
        if self.joint == "query_key_value":
            heads = torch.arange(self.n_heads)[:, None] * 3 + PORTS.index(port)
            return (heads * self.d_head + torch.arange(self.d_head)).flatten()
        start = sum(sizes[p] for p in PORTS[: PORTS.index(port)]) * self.d_head
        return torch.arange(start, start + sizes[port] * self.d_head)


class _Asker:
    """Runs the stock model on some prompts, up to the value that is asked for."""

    def __init__(self, model: SplitModel, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask = model, ids, mask

    def first_stream(self) -> Tensor:
        return self._run({}, {}, before=self.model.blocks[0])

    def head(self, layer: int, head: int, streams: Mapping[str, Tensor]) -> Tensor:
        """z of one head when q, k and v are made of these streams."""
        model, block = self.model, self.model.blocks[layer]
        norm = block.input_layernorm.forward if model.before else (lambda stream: stream)

        def answer(projection: Any, ports: str) -> Callable[..., Tensor]:
            def hook(*_: Any) -> Tensor:
                made = {port: projection.forward(norm(streams[port])) for port in ports}
                whole = made[ports[0]]
                for port in ports if len(ports) > 1 else "":
                    columns = model.columns(port)
                    whole = whole.index_copy(-1, columns, made[port][..., columns])
                return whole

            return hook

        made_by = model.projections(layer)
        hooks = {projection: answer(projection, ports) for projection, ports in made_by.items()}
        z = self._run({}, hooks, before=model.output_projection(layer))
        return z[..., head * model.d_head : (head + 1) * model.d_head]

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        """What the MLP of a layer adds to the stream when it reads this one."""
        block = self.model.blocks[layer]
        entry = getattr(block, self.model.mlp_norm) if self.model.before else block.mlp
        end = block.post_feedforward_layernorm if self.model.behind else block.mlp
        return self._run({entry: lambda *_: (stream,)}, {}, behind=end)

    def logits(self, stream: Tensor) -> Tensor:
        """Of the last token when the last norm reads this stream."""
        entry = self.model.final_norm
        return self._run({entry: lambda *_: (stream,)}, {})[:, -1]

    def _run(
        self,
        entering: Mapping[Any, Callable[..., Any]],
        leaving: Mapping[Any, Callable[..., Any]],
        *,
        before: Any = None,
        behind: Any = None,
    ) -> Tensor:
        """The value in front of or behind a module, or the logits, of a run under hooks."""
        caught: list[Tensor] = []

        def catch(value: Any) -> None:
            caught.append(value[0] if isinstance(value, tuple) else value)
            raise _Reached

        handles = [module.register_forward_pre_hook(hook) for module, hook in entering.items()]
        handles += [module.register_forward_hook(hook) for module, hook in leaving.items()]
        if before is not None:
            handles.append(before.register_forward_pre_hook(lambda _, given: catch(given[0])))
        if behind is not None:
            handles.append(behind.register_forward_hook(lambda *given: catch(given[-1])))
        positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)
        try:
            done = self.model.module(
                self.ids, attention_mask=self.mask, position_ids=positions, use_cache=False
            )
            caught.append(done.logits)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return caught[0]


def receiver_gradients(
    module: nn.Module,
    ids: Tensor,
    mask: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    embedding: Tensor | None = None,
) -> dict[Receiver, Tensor]:
    """d metric / d what each (target, port) reads, ``[batch, pos, d_model]``, by autograd."""
    model = SplitModel(module)
    with torch.no_grad():
        first = model.run(ids, mask).outputs["input"]
    pushes = {key: torch.zeros_like(first).requires_grad_() for key in model.receivers}
    with torch.enable_grad():
        run = model.run(ids, mask, pushes=pushes, embedding=embedding)
        total = metric(run.logits[0]).sum()
    return dict(zip(pushes, torch.autograd.grad(total, list(pushes.values())), strict=True))
