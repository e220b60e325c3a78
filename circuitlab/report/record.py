"""The run record of a report: what ran, on what, how it was asked for, and a hash of each file."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuitlab
from circuitlab.evaluation.subject import recorded_analysis
from circuitlab.zoo import MODELS

if TYPE_CHECKING:
    from circuitlab.evaluation.evidence import Evidence
    from circuitlab.model import TracedModel

SCHEMA = "circuitlab-run/1"

_PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "nnsight", "networkx", "matplotlib",
    "pygraphviz",
)  # fmt: skip


def run_record(
    evidence: Evidence,
    *,
    argv: Sequence[str],
    settings: Mapping[str, Any],
    started: datetime,
    files: Mapping[str, bytes],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What a reader needs to trust the report, or to run it again, as plain JSON."""
    model = evidence.subject.model
    return {
        "schema": SCHEMA,
        "argv": list(argv),
        "settings": dict(settings),
        "seed": evidence.results["settings"]["seed"],
        "model": {
            "name": model.name,
            "revision": model.revision,
            "weights_digest": model.weights_digest,
            "n_parameters": model.n_parameters,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "remote": model.remote,
        },
        "tokenizer_digest": tokenizer_digest(model),
        "task": {
            "name": evidence.subject.task.name,
            "digest": evidence.subject.task.digest,
            "held_out_digest": evidence.held_out.task.digest,
        },
        "versions": versions(),
        "git": commit(Path(circuitlab.__file__).parent),
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "done",
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
        "warnings": list(warnings),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of what the numbers may depend on; None where it is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "circuitlab": circuitlab.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def tokenizer_digest(model: TracedModel) -> str | None:
    """SHA-256 of the tokenizer; None for a model without one."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def commit(folder: Path) -> str | None:
    """The commit that is checked out around a folder; None where there is none."""
    for above in (folder, *folder.parents):
        head = above / ".git" / "HEAD"
        try:
            text = head.read_text("ascii").strip()
            if not text.startswith("ref: "):
                return text
            name = text.removeprefix("ref: ")
            loose = head.parent / name
            if loose.is_file():
                return loose.read_text("ascii").strip()
            packed = (head.parent / "packed-refs").read_text("ascii").splitlines()
            return next((line.split(" ")[0] for line in packed if line.endswith(f" {name}")), None)
        except (OSError, UnicodeDecodeError):
            continue
    return None


def reproduction(evidence: Evidence, task_file: Path | None, given: Mapping[str, Any]) -> str:
    """One command line that makes the report anew, in a folder ``again``.

    Where the circuit says how it was found, the command finds it again first; else it begins with
    the report's own ``circuit.json``.

    Args:
        evidence: What was measured.
        task_file: Where the task came from; None for a named one.
        given: Flags of the report that were not left at their defaults.
    """
    task = evidence.subject.task.name if task_file is None else str(task_file)
    flag = "--task" if task_file is None else "--task-file"
    report = ["circuitlab", "report", "circuit.json", flag, task, *_flags(given)]
    report += ["--output", "again"]
    facts = evidence.subject.circuit.graph
    options, model = facts.get("options"), facts.get("model")
    known = recorded_analysis(evidence.subject.circuit, evidence.subject.registry) is not None
    if not (known and isinstance(model, str) and isinstance(options, dict)):
        return shlex.join(report)
    recorded = {
        "model": given.get("model", model),
        "revision": None if model in MODELS else facts.get("model_revision"),
        "metric": facts.get("metric"),
        "n-prompts": facts.get("n_pairs"),
        "dtype": facts.get("dtype"),
        "seed": facts.get("seed"),
    }
    trace = [
        "circuitlab",
        "trace",
        str(facts["analysis"]),
        flag,
        task,
        *_flags({**recorded, **options}),
    ]
    return f"{shlex.join([*trace, '--output', 'circuit.json'])} && {shlex.join(report)}"


def _flags(values: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words
