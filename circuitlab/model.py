"""TracedModel: a model whose sites can be read, written and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from circuitlab.architectures import Architecture
from circuitlab.attending import Attention
from circuitlab.errors import GraphError, ModelError, NumericsError, SiteError
from circuitlab.fresh import fresh_weights
from circuitlab.labels import counted
from circuitlab.notebook import Shown, html_table
from circuitlab.plans import Ending, Locator, make_plan
from circuitlab.prompts import EncodedTask, Tokens, encode_prompts, encode_task
from circuitlab.receivers import Receivers
from circuitlab.run import AwaitedRun, Run
from circuitlab.sites import Site
from circuitlab.tokenization import token_texts
from circuitlab.tracing import Done, Engine, Pass, Tracer
from circuitlab.weights import Weights
from circuitlab.wiring import PORTS
from circuitlab.writes import source_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from circuitlab.tasks import Prompt, Task
    from circuitlab.wiring import ReceiverBlock, Wiring

Prompts = Tokens | Sequence["Prompt"]


class TracedModel(Shown):
    """A transformer whose sites can be read and written; made by :func:`circuitlab.load_model`.

    Attributes:
        name: Where it came from: a bundled name, folder, hub id, or class name.
        architecture: Module paths and sizes.
        tokenizer: None for a model that reads token ids.
        weights: Its weights by head and by reader, as they are or with norms folded in.
        attention: What its heads make of queries, keys and values, by the architecture.
        revision: Commit of a hub model, or digest of bundled weights; None where unknown.
        task_name: Name of the task a bundled model was made for; None otherwise.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        architecture: Architecture,
        *,
        name: str,
        revision: str | None = None,
        task_name: str | None = None,
        corpus: Callable[[int, int], Sequence[Prompt]] | None = None,
        fresh: Callable[[int], PreTrainedModel] | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.name = name
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.revision = revision
        self.task_name = task_name
        self._corpus = corpus
        self._fresh = fresh
        self._module = module
        self._locator = Locator(architecture)
        self._engine = Tracer(module) if engine is None else engine
        self.weights = Weights(module, self._locator)
        self.attention = Attention(module, architecture)
        self._receivers = Receivers(architecture, self.weights, self.attention)

    def __repr__(self) -> str:
        inside = "blocks alone" if self.architecture.blocks_only else counted(self.n_heads, "head")
        size = f"{counted(self.n_layers, 'layer')}, {inside}"
        return (
            f"TracedModel({self.name!r}, {self.architecture.family}, {size}, "
            f"d_model {self.d_model}, {self.dtype} on {self.device})"
        )

    def _shown(self) -> tuple[str, str]:
        a = self.architecture
        rows = [("family", a.family), ("blocks", a.n_layers), ("d_model", a.d_model)]
        rows += [("parameters", f"{self.n_parameters:,}"), ("on", f"{self.dtype}, {self.device}")]
        rows += [("inside blocks", "not known")] if a.blocks_only else [
            ("heads", a.n_heads), ("edges", f"{self.wiring.n_edges:,}"),
        ]  # fmt: skip
        rows += [("task", self.task_name)] if self.task_name else []
        return repr(self), html_table((), rows, caption=self.name)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.architecture.n_layers

    @property
    def n_heads(self) -> int:
        """Number of attention heads per block."""
        return self.architecture.n_heads

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.architecture.d_model

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.architecture.d_head

    @property
    def n_positions(self) -> int:
        """Longest prompt the model reads, in tokens."""
        return self.architecture.n_positions

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(self._module.config.get_text_config().vocab_size)

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self._module.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self._module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self._module.parameters()).dtype

    @property
    def remote(self) -> bool:
        """Whether passes run on a host.

        There each look at the outcome of a run is a round trip, which all runs started before it
        share: start what can be started before you look at any.
        """
        return self._engine.remote

    @property
    def weights_digest(self) -> str:
        """Short digest of the weights; of a model on a host, what the host calls it."""
        return self._engine.weights_digest

    @cached_property
    def wiring(self) -> Wiring:
        """The residual graph: sources, receivers, edges."""
        return self.architecture.wiring

    def tokens(self, prompts: Sequence[Prompt]) -> Tokens:
        """Prompts as left-padded token ids on the model's device.

        Raises:
            TaskError: a prompt is empty, too long, or holds a word the model does not know.
        """
        tokens = encode_prompts(
            self.tokenizer, prompts, vocab_size=self.vocab_size, n_positions=self.n_positions
        )
        return tokens.to(self.device)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token id as readable text; ``#id`` where there is none."""
        return token_texts(self.tokenizer, ids)

    def encode(self, task: Task) -> EncodedTask:
        """A task as this model reads it, on the model's device.

        Raises:
            TaskError: a pair cannot be used; the message names it.
        """
        encoded = encode_task(
            self.tokenizer,
            task,
            vocab_size=self.vocab_size,
            n_positions=self.n_positions,
        )
        return encoded.to(self.device)

    def corpus(self, n: int, seed: int = 0) -> list[Prompt]:
        """Prompts like those the model learned from, the same for the same seed.

        Raises:
            ModelError: it is no bundled model, so what it learned from is not here.
        """
        if self._corpus is None:
            raise ModelError(
                f"model {self.name!r} brings no texts of its own; give some (--data FILE)"
            )
        return list(self._corpus(n, seed))

    def reinitialised(self, seed: int = 0) -> TracedModel:
        """The model as it was before training, with weights of this seed: a control.

        A bundled model begins as its recipe says, any other as its family does. Everything else
        stays: tokenizer, corpus, type and device.

        Raises:
            ModelError: the family leaves a weight as it was, or the weights are on a host.
        """
        if self.remote:
            raise ModelError(
                f"model {self.name!r} is on a host, which runs the weights it has; leave out "
                f"controls with new weights, or load the model here"
            )
        make: Callable[[int], Any] = self._fresh or partial(fresh_weights, self._module)
        return TracedModel(
            make(seed).to(device=self.device, dtype=self.dtype).requires_grad_(False),
            self.tokenizer,
            self.architecture,
            name=f"{self.name}, new weights of seed {seed}",
            task_name=self.task_name,
            corpus=self._corpus,
            fresh=self._fresh,
        )

    def run(
        self,
        prompts: Prompts,
        *,
        read: Iterable[Site] = (),
        write: Mapping[Site, Tensor] | None = None,
        gradient_of: Callable[[Tensor], Tensor] | None = None,
        gradient_at: Iterable[Site] = (),
        logits: Literal["last", "all", "none"] = "last",
        vocabulary: Tensor | None = None,
    ) -> Run:
        """One forward pass, and a backward one when ``gradient_of`` is given.

        Args:
            prompts: Tokens, or prompts to encode.
            read: Sites to keep. A read shows what was written there.
            write: Replaces sites by tensors that broadcast to the site's shape. A module whose
                whole output is written is not run when nothing inside it is asked for: writing a
                ``resid_pre`` skips all blocks before it.
            gradient_of: From the last position's logits ``[batch, vocab]`` to one number per
                prompt ``[batch]``; prompts do not influence one another, so the gradient of the
                sum is each prompt's own.
            gradient_at: Sites to differentiate at. At ``mlp_in`` the gradient is the MLP's alone.
                q, k, v and z are read too, and the ``resid_pre`` of the layer of q, k or v.
            logits: Unembed only the last position, or all of them, or stop after the last site.
            vocabulary: Unembed only these tokens, ``[n]``; ``run.logits`` is ``[batch, pos, n]``.

        Returns:
            The run; every tensor in it is detached.

        Raises:
            SiteError: a site does not exist here, or a written tensor does not fit.
            NumericsError: the logits or a gradient hold NaN or infinity.
        """
        tokens = prompts if isinstance(prompts, Tokens) else self.tokens(prompts)
        asked, differentiated = list(read), list(gradient_at)
        for site in (*asked, *differentiated, *(write or ())):
            self._locator.check(site)
        self._check_patterns(asked)
        taps = sorted({site.whole for site in differentiated})
        if bool(taps) != (gradient_of is not None):
            raise SiteError("gradient_of and gradient_at go together: give both or neither")
        kept = {site.whole for site in asked}
        ports = [tap for tap in taps if tap.kind in PORTS]
        kept |= {*ports, *(Site("resid_pre", tap.layer) for tap in ports)}
        kept |= {tap for tap in taps if tap.kind == "z"}
        # Differentiation starts at the stream that feeds the first tap.
        start = [Site("resid_pre", taps[0].layer)] if taps and taps[0].layer is not None else []
        written = {
            site: self._locator.fit(site, tensor.to(self.device, self.dtype), *tokens.ids.shape)
            for site, tensor in (write or {}).items()
        }
        ending = Ending(logits != "all", vocabulary, logits == "none")
        plan = make_plan(self._locator, kept, written, [*start, *taps], ending)
        finish = self._engine.start(Pass(tokens, plan, logits == "all", gradient_of))

        def outcome() -> Run:
            return self._finished(finish(), tokens, written, logits == "none")

        return AwaitedRun(tokens, self._locator, outcome) if self.remote else outcome()

    def _finished(
        self, done: Done, tokens: Tokens, written: Mapping[Site, Tensor], stopped: bool
    ) -> Run:
        """What a pass gave, if it is finite."""
        if stopped:
            return Run(tokens, done.logits[:, :0, :0], done.read, {}, self._locator)
        if not torch.isfinite(done.logits).all():
            raise self._nonfinite(tokens, done.logits, written)
        return Run(tokens, done.logits, done.read, done.gradients, self._locator)

    @cached_property
    def source_sites(self) -> tuple[Site, ...]:
        """What :meth:`source_outputs` needs read."""
        layers = range(self.n_layers)
        if self.architecture.blocks_only:
            return (Site("resid_pre", 0), *(Site("resid_post", layer) for layer in layers))
        per_layer = [(Site("z", layer), Site("mlp_out", layer)) for layer in layers]
        return (Site("resid_pre", 0), *(site for pair in per_layer for site in pair))

    def joins(self, source: str) -> Site:
        """Where in the residual stream a source's output first appears.

        Raises:
            GraphError: the model has no such source.
        """
        kind, layer, _ = self.wiring.component(source)
        if kind == "logits":
            raise GraphError("component 'logits' writes nothing; it is no source")
        if kind == "input":
            return Site("resid_pre", 0)
        mid = kind == "head" and not self.wiring.parallel
        return Site("resid_mid" if mid else "resid_post", layer)

    @cached_property
    def receiver_sites(self) -> tuple[Site, ...]:
        """What :meth:`receiver_gradients` needs as ``gradient_at``."""
        return self._receivers.sites

    def source_outputs(self, run: Run, *, less: Run | None = None) -> Tensor:
        """What each source writes to the residual stream, ``[n_sources, batch, pos, d_model]``.

        Sources are ``wiring.sources``. A head's output is ``z @ W_O`` without the output bias, an
        MLP's has its bias. Where a norm stands behind the attention, a head's output is its share
        of the normed sum: divided by the scale that the sum has in that very run. Of a model of
        which only the blocks are known, sources are the embedding and what each block adds. At
        least float32; 0 where a prompt of ``run`` is padded.

        Args:
            run: A run that read :attr:`source_sites`.
            less: Another such run, whose outputs are subtracted.

        Raises:
            SiteError: a run did not read :attr:`source_sites`.
        """
        return source_outputs(self, run, less)

    def receiver_gradients(self, *runs: Run) -> Iterator[tuple[ReceiverBlock, Tensor]]:
        """Gradients at the receivers' inputs, mean over runs, one block of receivers at a time.

        Heads that share keys and values, or a norm of their queries or keys, have gradients of
        their own all the same: of what reaches the shared key as this head alone reads it.

        Yields:
            A block of ``wiring.blocks()`` and the gradient at each of its receivers' own reading of
            the residual stream, before its norm: ``[receivers, batch, pos, d_model]``, at least
            float32.

        Raises:
            SiteError: a run did not differentiate at :attr:`receiver_sites`.
            ModelError: heads share, and attend otherwise than the architecture says.
        """
        return self._receivers.gradients(runs, torch.promote_types(self.dtype, torch.float32))

    def _check_patterns(self, asked: Sequence[Site]) -> None:
        kind = getattr(self._module.config, "_attn_implementation", None) or "eager"
        if kind != "eager" and any(site.kind == "pattern" for site in asked):
            raise SiteError(
                f"attention of kind {kind!r} keeps no patterns; call "
                f"module.set_attn_implementation('eager') before load_model"
            )

    def _nonfinite(
        self, tokens: Tokens, logits: Tensor, write: Mapping[Site, Tensor]
    ) -> NumericsError:
        """The error that names the first site, in forward order, that is not finite."""
        inside = () if self.architecture.blocks_only else (*PORTS, "z", "attn_out", "mlp_out")
        kinds = ("resid_pre", *inside, "resid_post")
        sites = sorted(Site(k, layer) for k in kinds for layer in range(self.n_layers))
        plan = make_plan(self._locator, sites, write, ())
        values = self._engine.start(Pass(tokens, plan))().read
        run = Run(tokens, logits, values, {}, self._locator)
        first, where = logits, "logits"
        for site in sites:
            if not torch.isfinite(run[site][tokens.mask]).all():
                first, where = run[site], str(site)
                break
        bad = ~torch.isfinite(first.flatten(1)).all(1)
        row = int(bad.nonzero()[0]) if bad.any() else 0
        kind = "NaN" if torch.isnan(first[row]).any() else "infinity"
        return NumericsError(
            f"{kind} at site {where}, prompt {row + 1} of the batch; "
            f"check the weights, or run in a wider type (--dtype float32)"
        )
