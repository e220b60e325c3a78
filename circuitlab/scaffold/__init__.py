"""Scaffold: a new plugin to start from, as files that install, run and pass their tests."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from circuitlab.errors import OptionError, ResourceError
from circuitlab.hookspecs import API_VERSION
from circuitlab.registry import Registry

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
#: Longer names would not fit into the lines of the templates.
LONGEST = 40
#: Each template and where it goes, in which ``MODULE`` is the import name.
_FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "readme.md.txt": "README.md",
    "plugin.py.txt": "MODULE/__init__.py",
    "test.py.txt": "tests/test_plugin.py",
}
#: Says that the package has types.
_MARK = "MODULE/py.typed"


def write_plugin(name: str, folder: Path) -> list[Path]:
    """Write a distribution ``circuitlab-NAME`` with one plugin and one analysis, both NAME.

    Args:
        name: In kebab-case, at most :data:`LONGEST` letters; no plugin or analysis here has it.
        folder: Where; it must not exist.

    Returns:
        The files.

    Raises:
        OptionError: the name is not kebab-case, too long, or taken.
        ResourceError: the folder exists or cannot be written.
    """
    _check_name(name)
    module = f"circuitlab_{name.replace('-', '_')}"
    if folder.exists():
        raise ResourceError(f"folder {str(folder)!r} exists; give another with --output")
    values = {"name": name, "module": module, "api": str(API_VERSION)}
    written = []
    try:
        for template, place in _FILES.items():
            path = folder / place.replace("MODULE", module)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = files(__name__).joinpath("templates", template).read_text("utf-8")
            path.write_text(Template(text).substitute(values), encoding="utf-8")
            written.append(path)
        mark = folder / _MARK.replace("MODULE", module)
        mark.touch()
    except OSError as error:
        raise ResourceError(
            f"folder {str(folder)!r} cannot be written: {error.strerror or error}; give another "
            f"with --output"
        ) from error
    return [*written, mark]


def _check_name(name: str) -> None:
    if not _KEBAB.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        hint = f"; how about {near!r}" if _KEBAB.fullmatch(near) else ""
        raise OptionError(
            f"plugin name {name!r} is not kebab-case: small letters and digits, words joined by "
            f"'-', a letter first{hint}"
        )
    if len(name) > LONGEST:
        raise OptionError(f"plugin name {name!r} is longer than {LONGEST} letters; shorten it")
    registry = Registry.load()
    taken = {"plugin": {*registry.plugins, *registry.off}, "analysis": {*registry.analyses}}
    for kind, names in taken.items():
        if name in names:
            raise OptionError(f"there is an installed {kind} {name!r}; choose another name")
