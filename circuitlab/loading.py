"""load_model: a bundled name, a local folder, a hub id, or a live module becomes a TracedModel."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from circuitlab import zoo
from circuitlab.blocks import blocks_only
from circuitlab.checks import Probe, probe, require, run_checks
from circuitlab.errors import ModelError, OptionError
from circuitlab.model import TracedModel
from circuitlab.pretrained import (
    TOKENIZER_FILES,
    hub_answers,
    read_config,
    read_pretrained,
    read_tokenizer,
)
from circuitlab.registry import Registry
from circuitlab.remote.client import Client, remote_client
from circuitlab.remote.engine import RemoteEngine
from circuitlab.remote.skeleton import RemoteModule, empty_tokenizer, make_skeleton
from circuitlab.room import check_room

if TYPE_CHECKING:
    from circuitlab.architectures import Architecture

DType = Literal["float32", "bfloat16", "float16", "float64"]
Source = str | Path | nn.Module | tuple[Any, Any] | TracedModel


def load_model(
    source: Source,
    *,
    device: str = "auto",
    dtype: DType = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    remote: bool | str = False,
    remote_key: str | None = None,
    timeout: float = 3600.0,
    job_log: str | Path | None = None,
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
        remote: True to run it on NDIF, or the address of another host. Then only configuration and
            tokenizer are read here, from a folder or the hub; the API key is ``NDIF_API_KEY``.
        remote_key: What the host calls the model: a repository, or the host's whole model key. By
            default ``source``, in the hub's own spelling where the hub answers.
        timeout: Seconds that one job on the host may take, waiting included.
        job_log: File in which ids of jobs are written down at once; a later run that sends the same
            work within a day takes its jobs up.
        registry: Plugins that may know the family; by default all installed ones.

    Raises:
        ModelError: it cannot be had, or no plugin knows its family.
        QualityError: the traced model differs from the plain one.
        ResourceError: the weights of a folder do not fit into the memory that is free.
        OptionError: the device does not exist, or the remote address is not safe.
        RemoteError: the host refuses or cannot be reached.
    """
    if isinstance(source, TracedModel):
        return source
    if remote:
        if (device, dtype) != ("auto", "float32"):
            raise OptionError(
                f"a remote model has the device and type its host gave it; leave out "
                f"--device {device} and --dtype {dtype}, or --remote"
            )
        client = remote_client(remote, remote_key, timeout, job_log)
        model, plain = _on_host(source, client, revision, trust_remote_code, registry)
        require(model, run_checks(model, plain))
        return model
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
            if Path(source).is_dir():
                check_room(Path(source), getattr(torch, dtype), where)
            module, tokenizer = read_pretrained(
                str(source), revision, trust_remote_code, allow_pickle
            )
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


def _on_host(
    source: Any,
    client: Client,
    revision: str | None,
    trust_remote_code: bool,
    registry: Registry | None,
) -> tuple[TracedModel, Probe]:
    """A model whose weights are on a host, before its self-check."""
    if not isinstance(source, str | Path) or source in zoo.MODELS:
        shown = source if isinstance(source, str) else type(source).__name__
        raise ModelError(
            f"{shown!r} is here and on no host; leave --remote out, or give a folder or a hub id"
        )
    name, folder = str(source), Path(source).is_dir()
    cached_only = folder or not hub_answers()
    skeleton = make_skeleton(
        read_config(name, folder, revision, trust_remote_code, cached_only),
        trust_remote_code=trust_remote_code,
    )
    tokenizer = None
    if not folder or any((Path(source) / file).exists() for file in TOKENIZER_FILES):
        tokenizer = read_tokenizer(name, revision, trust_remote_code, cached_only)
    client.name_model(name, folder, revision, trust_remote_code, ask_hub=not cached_only)
    architecture = _architecture(skeleton, name, registry or Registry.load())
    engine = RemoteEngine(skeleton, tokenizer or empty_tokenizer(), client, architecture.d_model)
    module: Any = RemoteModule(skeleton, architecture, engine)
    model = TracedModel(
        module,
        tokenizer,
        architecture,
        name=name,
        revision=getattr(skeleton.config, "_commit_hash", None) or revision,
        engine=engine,
    )
    return model, probe(module)


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
        try:
            return blocks_only(module)
        except ModelError as error:
            raise ModelError(
                f"model {name!r} is of family {module.config.model_type!r} "
                f"({type(module).__name__}), which no installed plugin describes (asked: "
                f"{', '.join(registry.describers)}); {error}; no analysis works until a plugin "
                f"offers adapt_architecture for it"
            ) from error
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
