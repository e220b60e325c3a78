"""load_model: a bundled name, a local folder, a hub id, or a live module becomes a TracedModel."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
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
    SPREADS,
    TOKENIZER_FILES,
    DeviceMap,
    Placement,
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
from circuitlab.spread import SpreadModule, SpreadTracer, first_device, is_spread

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
    device_map: DeviceMap | None = None,
    offload: str | Path | None = None,
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
        device_map: Spread the weights of a folder or hub model over devices: ``auto``,
            ``balanced``, ``balanced_low_0``, ``sequential``, or a device (``cuda:1``, ``cpu``,
            ``disk``) for each part by its path. Needs accelerate.
        offload: Folder for weights that fit into no memory; with it ``device_map`` is ``auto``
            unless it is given.
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
        OptionError: the device does not exist, the remote address is not safe, or ``device_map``
            is given together with ``device``, ``remote`` or a model that is small or in memory.
        RemoteError: the host refuses or cannot be reached.
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
        device_map=device_map,
        offload=offload,
        remote=remote,
        remote_key=remote_key,
        timeout=timeout,
        job_log=job_log,
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
    device_map: DeviceMap | None = None,
    offload: str | Path | None = None,
    remote: bool | str = False,
    remote_key: str | None = None,
    timeout: float = 3600.0,
    job_log: str | Path | None = None,
    registry: Registry | None = None,
) -> tuple[TracedModel, Probe]:
    """The model of :func:`load_model` before its self-check, and what the plain module says."""
    if remote:
        _check_remote(device, dtype, device_map, offload)
        client = remote_client(remote, remote_key, timeout, job_log)
        return _on_host(source, client, revision, trust_remote_code, registry)
    own: dict[str, Any] = {}
    module: Any
    tokenizer: Any
    placement = _placement(source, device, device_map, offload)
    if isinstance(source, str | Path):
        name, where, kind = str(source), _device(device), getattr(torch, dtype)
        if name in zoo.MODELS:
            module, tokenizer = zoo.load(name)
            own, revision = _bundled(name), None
        else:
            if Path(name).is_dir() and placement is None:
                check_room(Path(name), kind, where)
            read = (name, revision, trust_remote_code, allow_pickle)
            module, tokenizer = read_pretrained(*read, dtype=kind, placement=placement)
        revision = getattr(module.config, "_commit_hash", None) or revision
        module = module if is_spread(module) else module.to(device=where, dtype=kind)
        module.requires_grad_(False)
    else:
        module, tokenizer = source if isinstance(source, tuple) else (source, None)
        name = _live_name(module)
    module.eval()
    architecture = _architecture(module, name, registry or Registry.load())
    if is_spread(module):
        first = first_device(module)
        own = {"engine": SpreadTracer(module, first), "fresh": partial(_not_anew, name)}
        module = SpreadModule(module, first)
    plain = probe(module)
    return TracedModel(module, tokenizer, architecture, name=name, revision=revision, **own), plain


def _check_remote(
    device: str, dtype: str, device_map: DeviceMap | None, offload: str | Path | None
) -> None:
    """Refuse to say where the weights of a model go that stay on a host."""
    if device_map is not None or offload is not None:
        raise OptionError(
            "a remote model's weights are on its host; leave out --device-map and --offload, or "
            "--remote"
        )
    if (device, dtype) != ("auto", "float32"):
        raise OptionError(
            f"a remote model has the device and type its host gave it; leave out --device {device} "
            f"and --dtype {dtype}, or --remote"
        )


def _bundled(name: str) -> dict[str, Any]:
    """What a bundled model brings beside its weights."""
    model = zoo.MODELS[name]
    brought = {"task_name": model.task, "corpus": partial(zoo.corpus, name)}
    return brought | ({"fresh": partial(zoo.untrained, name)} if model.kind == "trained" else {})


def _placement(
    source: object, device: str, device_map: DeviceMap | None, offload: str | Path | None
) -> Placement | None:
    """Where parts of the model go, if that is said."""
    if device_map is None and offload is None:
        return None
    if not isinstance(source, str | Path) or source in zoo.MODELS:
        what = f"bundled model {source!r}" if isinstance(source, str) else "a live module"
        raise OptionError(
            f"--device-map and --offload say where weights are read to, and {what} needs none; "
            f"leave them out, or give a folder or a hub id"
        )
    if device != "auto":
        raise OptionError(
            f"--device {device} and --device-map both say where; leave one of them out"
        )
    if isinstance(device_map, str) and device_map not in SPREADS:
        _device(device_map, "--device-map", *SPREADS)
    if find_spec("accelerate") is None:
        raise ModelError(
            "--device-map and --offload need accelerate, which is not installed: run `pip install "
            "accelerate`, or leave them out"
        )
    return Placement("auto" if device_map is None else device_map, offload)


def _not_anew(name: str, seed: int) -> Any:
    """Refuse a model as it was before training, whose weights would be on one device."""
    raise ModelError(
        f"model {name!r} is spread over devices, and with new weights it would be on one; leave "
        f"out controls with new weights, or load it without --device-map and --offload"
    )


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


def _device(name: str, flag: str = "--device", *words: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(
            f"{flag} {name} cannot be used: {str(error).splitlines()[0]}; "
            f"try {', '.join(words or ['auto'])}, cpu, cuda, cuda:0 or mps"
        ) from error
    return device
