"""A report's folder: it appears whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitlab.errors import OptionError, ResourceError
from circuitlab.export import check_target
from circuitlab.page import Section, compose
from circuitlab.report.content import parts
from circuitlab.report.details import details
from circuitlab.report.figures import figures
from circuitlab.report.fragments import fragment
from circuitlab.report.markdown import markdown
from circuitlab.report.record import reproduction, run_record

if TYPE_CHECKING:
    from circuitlab.evaluation.evidence import Evidence

#: What tells a report's folder from any other.
_RECORD = "run.json"


def check_folder(folder: Path, *, force: bool) -> None:
    """Refuse, before any work is done, a folder that a report cannot take the place of.

    Raises:
        OptionError: it is there and holds something: an older report without ``force``, or files
            that are no report's.
        ResourceError: the folder around it does not exist or may not be written.
    """
    above = folder.resolve().parent
    if not above.is_dir():
        raise ResourceError(
            f"report {str(folder)!r}: folder {str(above)!r} does not exist; create it first"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise ResourceError(
            f"report {str(folder)!r}: folder {str(above)!r} may not be written; choose another one"
        )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OptionError(f"report {str(folder)!r} is not a folder; choose another name")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / _RECORD).is_file() or not (folder / "results.json").is_file():
        raise OptionError(
            f"report {str(folder)!r}: the folder holds something else; choose another name"
        )
    if not force:
        raise OptionError(
            f"report {str(folder)!r} is there already; choose another name, or replace it with "
            f"--force"
        )


def check_results(path: Path) -> None:
    """Refuse, before any work is done, a path that no results can be written to.

    Raises:
        OptionError: it does not end in ``.json``.
        ResourceError: its folder is missing or may not be written, or a folder has its name.
    """
    if path.suffix.lower() != ".json":
        raise OptionError(f"output {str(path)!r}: results are JSON; let the name end in .json")
    check_target(path)


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Write results as JSON; the file appears whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write(draft, _json(results))
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise ResourceError(
            f"output {str(path)!r} cannot be written: {error.strerror or error}; check free space "
            f"and permissions of its folder"
        ) from error


def write_report(
    evidence: Evidence,
    folder: Path | str,
    *,
    reproduce: str | None = None,
    argv: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    started: datetime | None = None,
    force: bool = False,
) -> list[str]:
    """Write a report of what was measured, and return warnings.

    The folder holds ``report.html``, ``report.md``, ``results.json``, ``circuit.json``,
    ``figures/*.svg``, ``run.json`` and ``REPRODUCE``. Every number in the text of ``report.md`` and
    ``report.html`` is one of ``results.json``, rounded to three digits.

    Args:
        evidence: What was measured.
        folder: Where to; it must not exist, or be empty.
        reproduce: The command that makes it anew; by default that of a named task.
        argv: The command line that asked for it.
        settings: What the settings were, for the run record.
        started: When the work began; now if None.
        force: Replace an older report.

    Raises:
        OptionError: the folder cannot be taken.
        ResourceError: it cannot be written.
    """
    started, folder = started or datetime.now(UTC), Path(folder)
    check_folder(folder, force=force)
    results = {**evidence.results, "nodes": details(evidence)}
    drawn, warnings = figures(evidence.circuit, results)
    files = _files(evidence, results, drawn, reproduce or reproduction(evidence, None, {}))
    record = run_record(
        evidence,
        argv=argv,
        settings=settings or {},
        started=started,
        files=files,
        warnings=[*results["warnings"], *warnings],
    )
    files[_RECORD] = _json(record)
    _place(files, folder)
    return warnings


def _files(
    evidence: Evidence, results: Mapping[str, Any], drawn: Mapping[str, str], reproduce: str
) -> dict[str, bytes]:
    """Every file but the run record, by its path in the folder."""
    made = parts(results, reproduce)
    page = compose(
        evidence.circuit,
        sections=[Section(part.title, fragment(part, drawn)) for part in made],
        details=results["nodes"],
        head=[f"{results['verdict']['word']}: {results['verdict']['sentence']}"],
    )
    named = (evidence.subject.model.name, evidence.subject.task.name)
    return {
        "report.html": page.encode(),
        "report.md": markdown(" · ".join(named), made, drawn).encode(),
        "results.json": _json(results),
        "circuit.json": evidence.circuit.to_json().encode(),
        "REPRODUCE": f"{reproduce}\n".encode(),
        **{f"figures/{name}.svg": text.encode() for name, text in drawn.items()},
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, allow_nan=False, indent=1) + "\n").encode()


def _place(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files beside the folder, and give them its name when all are on the disk."""
    target = folder.resolve()
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    try:
        for name, data in files.items():
            path = draft / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, data)
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
    except OSError as error:
        raise ResourceError(
            f"report {str(folder)!r} cannot be written: {error.strerror or error}; check free "
            f"space and permissions of {str(target.parent)!r}"
        ) from error
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
