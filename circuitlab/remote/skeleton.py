"""Skeleton: a model without weights; those that are asked for come from the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from circuitlab.architectures import Architecture
from circuitlab.errors import RemoteError
from circuitlab.plans import Plan
from circuitlab.prompts import Tokens
from circuitlab.remote.engine import RemoteEngine
from circuitlab.tracing import Pass

#: A model of at most so many bytes is fetched whole; of larger ones parts, so many at once.
WHOLE = 256 * 2**20
AT_ONCE = 2**30


class Logits(NamedTuple):
    """What a model returns, as far as it is asked for here."""

    logits: Tensor


def make_skeleton(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The modules that a configuration means, on the meta device."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM  # untyped upstream
    with torch.device("meta"):
        made = loader.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    return made.requires_grad_(False).eval()


def empty_tokenizer() -> Any:
    """A tokenizer of one word, for models that have none: nnsight wants one to be there."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    word = "·"
    words = Tokenizer(models.WordLevel({word: 0}, unk_token=word))
    fast: Any = PreTrainedTokenizerFast  # untyped upstream
    return fast(tokenizer_object=words, pad_token=word, eos_token=word)


class RemoteModule(nn.Module):
    """A model's modules, whose weights are fetched when a module is asked for.

    Called, it gives the host's logits.

    Args:
        skeleton: From :func:`make_skeleton`.
        architecture: What the modules are.
        engine: Runs plans on the host.
    """

    def __init__(self, skeleton: Any, architecture: Architecture, engine: RemoteEngine) -> None:
        super().__init__()
        self.skeleton = skeleton
        self.config = skeleton.config
        self._architecture = architecture
        self._engine = engine
        # Modules that hold weights themselves, and those that are here.
        self._holders = [name for name, part in skeleton.named_modules() if _own(part)]
        self._here: set[str] = set()
        whole = sum(map(self._size, self._holders)) <= WHOLE
        dtype, found = engine.dtype_and_weights(self._holders if whole else [])
        # Whoever asks for a module's type and device looks at its first weight.
        self.first = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        if whole:
            self._take(self._holders, found)

    def forward(self, **inputs: Tensor) -> Logits:
        """Logits of all positions, as the host's model gives them when nothing is read."""
        return Logits(self.begin(**inputs)())

    def begin(self, **inputs: Tensor) -> Callable[[], Tensor]:
        """The same, begun: the logits when they are called for."""
        plan: Plan = []
        mask = inputs["attention_mask"].bool()
        tokens = Tokens(inputs["input_ids"], mask, inputs["position_ids"])
        finish = self._engine.start(Pass(tokens, plan, keep_all=True))
        return lambda: finish().logits

    def get_submodule(self, target: str) -> nn.Module:
        """A module of the model, its weights here."""
        part: nn.Module = self.skeleton.get_submodule(target)
        missing = [name for name in self._within(target) if name not in self._here]
        if missing:
            self._fetch(missing, self._together(target))
        return part

    def _within(self, path: str) -> list[str]:
        return [name for name in self._holders if name == path or name.startswith(f"{path}.")]

    def _together(self, path: str) -> list[str]:
        """What is fetched with a module: the same module of every block."""
        a = self._architecture
        paths = [path]
        prefix = f"{a.blocks}."
        if path.startswith(prefix):
            inner = path.removeprefix(prefix).partition(".")[2]
            paths = [a.block(layer, inner) for layer in range(a.n_layers)]
        return [name for path in paths for name in self._within(path)]

    def _fetch(self, wanted: Sequence[str], others: Sequence[str]) -> None:
        part = list(wanted)
        total = sum(map(self._size, part))
        for name in others:
            if name not in self._here and name not in wanted:
                total += self._size(name)
                if total > AT_ONCE:
                    break
                part.append(name)
        self._take(part, self._engine.weights(part))

    def _take(self, paths: Sequence[str], found: Mapping[str, Any]) -> None:
        for path in paths:
            _fill(self.skeleton.get_submodule(path), path, found.get(path))
            self._here.add(path)

    def _size(self, name: str) -> int:
        return sum(tensor.nbytes for tensor in _own(self.skeleton.get_submodule(name)).values())


def _own(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, without those of its children."""
    found: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    return {**found, **dict(module.named_buffers(recurse=False))}


def _fill(module: nn.Module, path: str, tensors: Any) -> None:
    """Put weights into a module itself.

    Raises:
        RemoteError: they are not those that the configuration says it has.
    """
    for name, expected in _own(module).items():
        found = tensors.get(name) if isinstance(tensors, dict) else None
        shape = list(found.shape) if isinstance(found, Tensor) else "none"
        if found is None or shape != list(expected.shape):
            raise RemoteError(
                f"{path}.{name} of the host's model has shape {shape}, and the configuration says "
                f"{list(expected.shape)}: it is another model; check --remote-key"
            )
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(found, requires_grad=False)
        else:
            module._buffers[name] = found
