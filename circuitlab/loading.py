"""load_model: a bundled name, a local folder, a hub id, or a live module becomes a TracedModel."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch
from torch import nn

from circuitlab import zoo
from circuitlab.checks import Probe, probe, require, run_checks
from circuitlab.errors import ModelError, OptionError
from circuitlab.model import TracedModel
from circuitlab.registry import Registry, describe

if TYPE_CHECKING:
    from circuitlab.architectures import Architecture

DType = Literal["float32", "bfloat16", "float16", "float64"]
Source = str | Path | nn.Module | tuple[Any, Any] | TracedModel

#: Seconds the hub has to answer before only its cache is used.
HUB_TIMEOUT = 10.0
#: A folder with none of these has no tokenizer, and reads token ids.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def load_model(
    source: Source,
    *,
    device: str = "auto",
    dtype: DType = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    registry: Registry | None = None,
) -> TracedModel:
    """A model whose sites can be read and written, checked against plain Hugging Face.

    Args:
        source: A bundled name (``circuitlab models``); a folder written by ``save_pretrained``; a
            hub id; or a live module, alone or as ``(module, tokenizer)``, tokenizer None for
            prompts of token ids. A live module is put in evaluation mode and keeps its device and
            dtype; a TracedModel is returned unchanged.
        device: ``auto`` (CUDA if there is any, else CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: Type the weights are loaded in.
        revision: Commit, branch or tag of a hub model.
        trust_remote_code: Run code that the model's folder or repository carries.
        allow_pickle: Read ``pytorch_model.bin`` where there are no safetensors.
        registry: Plugins that may know the family; by default all installed ones.

    Raises:
        ModelError: it cannot be had, or no plugin knows its family.
        QualityError: the traced model differs from the plain one.
        OptionError: the device does not exist.
    """
    if isinstance(source, TracedModel):
        return source
    model, plain = load_unchecked(
        source,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        registry=registry,
    )
    require(model, run_checks(model, plain))
    return model


def load_unchecked(
    source: str | Path | nn.Module | tuple[Any, Any],
    *,
    device: str = "auto",
    dtype: DType = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    registry: Registry | None = None,
) -> tuple[TracedModel, Probe]:
    """The model of :func:`load_model` before its self-check, and what the plain module says."""
    task_name = corpus = fresh = None
    if isinstance(source, str | Path):
        where = _device(device)
        module: Any
        tokenizer: Any
        if source in zoo.MODELS:
            module, tokenizer = zoo.load(str(source))
            task_name = zoo.MODELS[str(source)].task
            corpus = partial(zoo.corpus, str(source))
            if zoo.MODELS[str(source)].kind == "trained":
                fresh = partial(zoo.untrained, str(source))
            revision = None
        else:
            module, tokenizer = _pretrained(str(source), revision, trust_remote_code, allow_pickle)
        revision = getattr(module.config, "_commit_hash", None) or revision
        module = module.to(device=where, dtype=getattr(torch, dtype)).requires_grad_(False)
        name = str(source)
    else:
        module, tokenizer = source if isinstance(source, tuple) else (source, None)
        name = _live_name(module)
    module.eval()
    architecture = _architecture(module, name, registry or Registry.load())
    plain = probe(module)
    model = TracedModel(
        module,
        tokenizer,
        architecture,
        name=name,
        revision=revision,
        task_name=task_name,
        corpus=corpus,
        fresh=fresh,
    )
    return model, plain


def _live_name(module: Any) -> str:
    if not isinstance(module, nn.Module) or not hasattr(module, "config"):
        raise ModelError(
            f"{type(module).__name__} is not a Hugging Face model; give a bundled name, a folder, "
            f"a hub id, or (module, tokenizer)"
        )
    return str(getattr(module, "name_or_path", "") or type(module).__name__)


def _architecture(module: Any, name: str, registry: Registry) -> Architecture:
    architecture = registry.adapt(module.config)
    if architecture is None:
        known = sorted(
            {i.name for i in registry.plugins.values() if "adapt_architecture" in i.hooks}
        )
        raise ModelError(
            f"model {name!r} is of family {module.config.model_type!r} ({type(module).__name__}), "
            f"which no installed plugin describes (asked: {', '.join(known)}); the core knows "
            f"GPT-2; no analysis works until a plugin offers adapt_architecture for it"
        )
    for path in architecture.module_paths():
        try:
            module.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"model {name!r} was taken for {architecture.family}, but its "
                f"{type(module).__name__} has no module {path!r}; a plugin can describe it by "
                f"adapt_architecture"
            ) from None
    return architecture


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(
            f"--device {name} cannot be used: {str(error).splitlines()[0]}; "
            f"try auto, cpu, cuda, cuda:0 or mps"
        ) from error
    return device


def _pretrained(
    source: str, revision: str | None, trust_remote_code: bool, allow_pickle: bool
) -> tuple[Any, Any]:
    """Module and tokenizer from a folder or the hub, every weight accounted for."""
    local = Path(source).is_dir()
    if not local and (Path(source).exists() or source.startswith((".", "/", "~"))):
        raise ModelError(
            f"model {source!r} is not a folder; give a bundled name ({', '.join(zoo.MODELS)}), a "
            f"folder with config.json and model.safetensors, or a hub id"
        )
    if local:
        _check_folder(Path(source), trust_remote_code, allow_pickle)
    from transformers import AutoModelForCausalLM

    cached_only = local or not _hub_answers()
    loader: Any = AutoModelForCausalLM  # its types know nothing of output_loading_info
    try:
        with _silent_loader():
            module, info = loader.from_pretrained(
                source,
                revision=revision or "main",
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                attn_implementation="eager",
                local_files_only=cached_only,
                # They are refused below, by name.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # the loader raises every kind; each becomes one clear line
        raise _refusal(source, local, error) from error
    _check_weights(source, info)
    if local and not any((Path(source) / file).exists() for file in TOKENIZER_FILES):
        return module, None
    return module, _tokenizer(source, revision, trust_remote_code, cached_only)


@contextmanager
def _silent_loader() -> Iterator[None]:
    """The loader without its bars and its report, which has colours even where nobody looks."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped upstream
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped upstream
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _hub_answers() -> bool:
    """Whether the hub can be reached; the loader itself would retry for half a minute."""
    from urllib.request import getproxies

    from huggingface_hub import constants

    # The hub's library looks at its variable once, when it is imported: a plugin may have done it.
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    address = urlsplit(constants.ENDPOINT)
    if getproxies().get(address.scheme) or not address.hostname:
        return True
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=HUB_TIMEOUT).close()
    except OSError:
        return False
    return True


def _check_folder(folder: Path, trust_remote_code: bool, allow_pickle: bool) -> None:
    config = folder / "config.json"
    try:
        described = json.loads(config.read_text("utf-8"))
    except OSError as error:
        raise ModelError(
            f"model folder {folder} has no readable config.json ({error.strerror}); "
            f"write it with model.save_pretrained({str(folder)!r})"
        ) from error
    except ValueError as error:
        raise ModelError(f"{config} is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise ModelError(f"{config} does not hold a JSON object")
    if "auto_map" in described and not trust_remote_code:
        code = ", ".join(sorted(map(str, described["auto_map"].values())))
        raise ModelError(
            f"model folder {folder} wants to run its own code ({code}); read it, then allow it "
            f"with --trust-remote-code"
        )
    if any(folder.glob("*.safetensors")):
        return
    if not any(folder.glob("*.bin")):
        raise ModelError(f"model folder {folder} has no weights; expected model.safetensors")
    if not allow_pickle:
        raise ModelError(
            f"model folder {folder} has its weights only as a pickle (.bin), which can run code "
            f"when it is read; save it with safetensors, or trust it with --allow-pickle"
        )


def _check_weights(source: str, info: dict[str, Any]) -> None:
    """Refuse weights that do not fill the model: the rest would be random."""
    missing = sorted(info["missing_keys"])
    shapes = info["mismatched_keys"]
    wrong = sorted(f"{name}, {list(there)} for {list(here)}" for name, there, here in shapes)
    if missing or wrong:
        fact = f"lack {missing[0]}" if missing else f"have another shape for {wrong[0]}"
        raise ModelError(
            f"the weights of {source!r} {fact} ({len(missing)} missing, {len(wrong)} of the wrong "
            f"shape): the model would be partly random; save it again with save_pretrained"
        )


def _tokenizer(
    source: str, revision: str | None, trust_remote_code: bool, cached_only: bool
) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            local_files_only=cached_only,
            padding_side="left",
        )
    except Exception as error:  # as above
        raise ModelError(
            f"the tokenizer of {source!r} cannot be read: {describe(error)}"
        ) from error


def _refusal(source: str, local: bool, error: BaseException) -> ModelError:
    """One clear line for whatever the loader raised; a token is never part of it."""
    names = {type(e).__name__ for e in _chain(error)}
    responses = [getattr(e, "response", None) for e in _chain(error)]
    statuses = {getattr(response, "status_code", None) for response in responses}
    text = " ".join(str(e) for e in _chain(error))
    if "trust_remote_code" in text:
        return ModelError(
            f"model {source!r} wants to run code of its own; read it in its repository, then allow "
            f"it with --trust-remote-code"
        )
    if local:
        cause = describe(error)
        if "SafetensorError" in names or "header" in text.lower():
            cause = f"the safetensors file is truncated or damaged ({describe(error)})"
        return ModelError(f"model folder {source!r} cannot be loaded: {cause}")
    refused_by_hub = {401, 403} & statuses and "RepositoryNotFoundError" not in names
    if "GatedRepoError" in names or refused_by_hub:
        return ModelError(
            f"model {source!r} is gated or private: accept its terms on its page, then log in with "
            f"`hf auth login` or set HF_TOKEN"
        )
    if {"RepositoryNotFoundError", "HFValidationError"} & names or 404 in statuses:
        return ModelError(
            f"model {source!r} is not bundled ({', '.join(zoo.MODELS)}), is not a folder here, and "
            f"the hub has no such repository, or it is private: then log in with `hf auth login` "
            f"or set HF_TOKEN"
        )
    return ModelError(
        f"model {source!r} is not bundled ({', '.join(zoo.MODELS)}), is not a folder here, and the "
        f"hub cannot be reached or has no copy in its cache; with a network run `huggingface-cli "
        f"download {source}` (`hf download {source}` in newer versions), or give a local folder"
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
