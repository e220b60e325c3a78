"""Dictionary files: a folder in the layout of SAELens, read with distrust and written whole."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from circuitlab.dictionaries.layout import OWN, Layout
from circuitlab.dictionaries.parsing import parse_config
from circuitlab.dictionaries.writing import write_config, write_tensors
from circuitlab.errors import CircuitLabError, ModelError, ResourceError
from circuitlab.labels import excerpt

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab.dictionaries.dictionary import Dictionary

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
#: Where SAELens keeps the scale of activations in the middle of a training.
SCALE = "activation_scaler.json"

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_FLOATS = ("F16", "BF16", "F32", "F64")
#: A scale of each latent that is applied before the decoder, by two names.
_FACTORS = ("finetuning_scaling_factor", "scaling_factor")


def read_dictionary(path: Path | str, *, device: torch.device | str | None = None) -> Dictionary:
    """The dictionary in a folder that :func:`write_dictionary` or SAELens wrote.

    Read are ``cfg.json`` and ``sae_weights.safetensors``, of SAELens's present layout and of the
    earlier one; nothing is unpickled. Scales that a file keeps beside the weights are folded into
    them. Weights are in at least float32.

    Args:
        path: The folder.
        device: Where to; None is the CPU.

    Raises:
        ModelError: there is no dictionary, or it is damaged, incomplete, or computes something that
            is not supported. The message names the folder and the key or tensor.
        ResourceError: the files cannot be read.
    """
    folder = Path(path)
    shown = f"dictionary '{excerpt(str(path))}'"
    try:
        if not folder.is_dir():
            raise ModelError(f"there is no such folder; give one with {CONFIG} and {WEIGHTS}")
        layout = parse_config(_read_json(folder / CONFIG))
        weights = folder / WEIGHTS
        _check_weights(weights, layout)
        tensors, factors = _read_tensors(weights, layout)
        scale = _read_scale(folder / SCALE) if layout.scaled else None
        dictionary = layout.dictionary(tensors, factors, scale)
    except OSError as error:
        raise ResourceError(f"{shown} cannot be read: {error.strerror or error}") from error
    except CircuitLabError as error:
        raise ModelError(f"{shown}: {error}") from error
    return dictionary if device is None else dictionary.to(device)


def write_dictionary(dictionary: Dictionary, path: Path | str) -> None:
    """Write a dictionary to a folder, in the layout of SAELens 6, which reads it.

    The folder appears under its name when it is complete and safe on the disk; an older dictionary
    of that name stays until then. SAELens has no topk and gated transcoders; these have names that
    only :func:`read_dictionary` knows.

    Args:
        dictionary: Any.
        path: The folder, in one that exists. If it exists it must hold a dictionary or nothing.

    Raises:
        OptionError: facts of the training cannot be written.
        ResourceError: the folder holds something else, or cannot be written.
    """
    config = write_config(dictionary)
    content = save(write_tensors(dictionary))
    config["metadata"][OWN]["weights_sha256"] = hashlib.sha256(content).hexdigest()
    files = {WEIGHTS: content, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    target = Path(path).resolve()
    shown = f"dictionary '{excerpt(str(path))}'"
    if target.exists() and not target.is_dir():
        raise ResourceError(f"{shown} is a file; name a folder")
    try:
        if target.exists() and (others := sorted({*os.listdir(target)} - files.keys())):
            raise ResourceError(
                f"{shown} holds other files ({excerpt(', '.join(others), 80)}); name another folder"
            )
        with tempfile.TemporaryDirectory(prefix=".circuitlab-", dir=target.parent) as scratch:
            draft = Path(scratch, "draft")
            draft.mkdir()
            for name, data in files.items():
                with (draft / name).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _move(draft, target, Path(scratch, "old"))
    except OSError as error:
        raise ResourceError(
            f"{shown} cannot be written: {error.strerror or error}; check free space and "
            f"permissions of '{excerpt(str(target.parent))}'"
        ) from error


def _move(draft: Path, target: Path, old: Path) -> None:
    """Put the draft in the target's place; if that fails, the target is as it was."""
    replaced = target.exists()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        if replaced:
            os.rename(old, target)
        raise


# --- reading --------------------------------------------------------------------------------------


def _read_json(path: Path) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing; give a folder that SAELens wrote") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not JSON ({excerpt(str(error))})") from error


def _read_scale(path: Path) -> float:
    """What activations were multiplied by in training.

    Raises:
        ModelError: it is not stored.
    """
    found: Any = _read_json(path) if path.exists() else None
    found = found if isinstance(found, dict) else {}
    scale: Any = found.get("scaling_factor")
    if type(scale) not in (int, float) or not scale > 0 or found.get("has_whitening"):
        raise ModelError(
            f"it was trained on scaled activations, and the scale is not stored; fold it into the "
            f'weights, or write {{"scaling_factor": NUMBER}} to {path.name}'
        )
    return float(scale)


def _check_weights(path: Path, layout: Layout) -> None:
    """Refuse a file that is not there, or not the one that was written."""
    if not path.is_file():
        found = sorted(p.name for p in path.parent.iterdir() if p.suffix in _PICKLES)
        pickled = f" ({', '.join(map(excerpt, found))} would run code when read)" if found else ""
        raise ModelError(f"{path.name} is missing{pickled}; save it with safetensors")
    if (wanted := layout.own.get("weights_sha256")) is not None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                raise ModelError(f"{path.name} is not the one that was written with {CONFIG}")


def _read_tensors(path: Path, layout: Layout) -> tuple[dict[str, Tensor], Tensor | None]:
    """The tensors by name, and the scale of each latent before the decoder, if there is any.

    Raises:
        ModelError: one is missing, not known, of another shape or type, or not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            wanted = layout.tensors()
            stored = {name: name for name in wanted}
            if "threshold" in wanted and "log_threshold" in names:
                stored["threshold"] = "log_threshold"
            shapes = {stored[name]: shape for name, shape in wanted.items()}
            shapes |= {name: [layout.n] for name in _FACTORS if name in names}
            _refuse_names("lacks", shapes.keys() - names)
            _refuse_names("has unknown", names - shapes.keys())
            tensors = {name: _tensor(file, name, shape) for name, shape in shapes.items()}
    except SafetensorError as error:
        raise ModelError(f"{path.name} is damaged ({excerpt(str(error))})") from error
    factors = {name: tensors.pop(name) for name in _FACTORS if name in names}
    if layout.finetuned and len(factors) != 1:
        raise ModelError(f"finetuning_scaling_factor is true, and {WEIGHTS} has not one of it")
    for name, factor in factors.items():
        if not layout.finetuned and not (factor == 1).all():
            raise ModelError(f"tensor {name} is not 1, and finetuning_scaling_factor is false")
    found = {name: tensors[own] for name, own in stored.items()}
    if stored.get("threshold") == "log_threshold":
        found["threshold"] = found["threshold"].double().exp().to(found["threshold"].dtype)
    return found, next(iter(factors.values())) if layout.finetuned else None


def _refuse_names(verb: str, names: set[str]) -> None:
    if names:
        raise ModelError(f"{WEIGHTS} {verb} tensors {excerpt(', '.join(sorted(names)))}")


def _tensor(file: Any, name: str, shape: list[int]) -> Tensor:
    """One tensor of an open file, its shape and type checked before it is read."""
    part = file.get_slice(name)
    if (found := list(part.get_shape())) != shape:
        raise ModelError(f"tensor {name} has shape {found}, and {CONFIG} says {shape}")
    if (kind := part.get_dtype()) not in _FLOATS:
        raise ModelError(f"tensor {name} is of type {kind}; it must be one of {', '.join(_FLOATS)}")
    tensor: Tensor = file.get_tensor(name)
    if not torch.isfinite(tensor).all():
        raise ModelError(f"tensor {name} holds NaN or infinity")
    return tensor
