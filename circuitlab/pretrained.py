"""Pretrained: a model's modules, configuration and tokenizer, from a folder or the hub."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from circuitlab import zoo
from circuitlab.errors import ModelError
from circuitlab.registry import describe

if TYPE_CHECKING:
    import torch

#: A word for how to spread a model, or a device for each of its parts, by path.
DeviceMap = str | Mapping[str, int | str]
#: These words; a device is one too.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
#: Seconds the hub has to answer before only its cache is used.
HUB_TIMEOUT = 10.0
#: A folder with none of these has no tokenizer, and reads token ids.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


class Placement(NamedTuple):
    """How accelerate is to spread a model over devices, and where the rest goes."""

    device_map: DeviceMap
    offload: str | Path | None

    def settings(self) -> dict[str, Any]:
        """For the loader."""
        given = self.device_map
        folder = None if self.offload is None else str(self.offload)
        return {
            "device_map": given if isinstance(given, str) else dict(given),
            "offload_folder": folder,
        }


def read_pretrained(
    source: str,
    revision: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    *,
    dtype: torch.dtype,
    placement: Placement | None = None,
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

    cached_only = local or not hub_answers()
    loader: Any = AutoModelForCausalLM  # its types know nothing of output_loading_info
    try:
        with _silent_loader():
            module, info = loader.from_pretrained(
                source,
                revision=revision or "main",
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                attn_implementation="eager",
                dtype=dtype,
                local_files_only=cached_only,
                # They are refused below, by name.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **({} if placement is None else placement.settings()),
            )
    except Exception as error:  # the loader raises every kind; each becomes one clear line
        raise _refusal(source, local, error) from error
    _check_weights(source, info)
    if local and not any((Path(source) / file).exists() for file in TOKENIZER_FILES):
        return module, None
    return module, read_tokenizer(source, revision, trust_remote_code, cached_only)


@contextmanager
def _silent_loader() -> Iterator[None]:
    """The loader without its bars and its report, which has colours even where nobody looks."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped upstream
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped upstream
    accelerate = getLogger("accelerate")
    level = accelerate.level
    accelerate.setLevel(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        accelerate.setLevel(level)


def hub_answers() -> bool:
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


def _check_config(folder: Path, trust_remote_code: bool) -> None:
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


def _check_folder(folder: Path, trust_remote_code: bool, allow_pickle: bool) -> None:
    _check_config(folder, trust_remote_code)
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


def read_tokenizer(
    source: str, revision: str | None, trust_remote_code: bool, cached_only: bool
) -> Any:
    """The tokenizer of a folder or hub id, padding on the left.

    Raises:
        ModelError: it cannot be read.
    """
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


def read_config(
    source: str, folder: bool, revision: str | None, trust_remote_code: bool, cached_only: bool
) -> Any:
    """The configuration of a model whose weights are not read here."""
    from transformers import AutoConfig

    if folder:
        _check_config(Path(source), trust_remote_code)
    try:
        return AutoConfig.from_pretrained(
            source,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            local_files_only=cached_only,
        )
    except Exception as error:  # as above
        raise _refusal(source, folder, error) from error
