"""Entry points: which plugins are installed, and which of them are wanted; nothing is imported."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import EntryPoint, distribution, entry_points
from pathlib import Path

from circuitlab.errors import PluginError

GROUP = "circuitlab"
#: The core's own plugin, without which there is no model family, task or file format.
CORE = "defaults"


def installed_plugins() -> dict[str, EntryPoint]:
    """Entry points by plugin name, the core's first.

    Raises:
        PluginError: two distributions claim one name, or CircuitLab itself is not installed.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name != CORE, e.name)):
        other = found.get(entry.name)
        if other is not None and _owner(other) != _owner(entry):
            raise PluginError(
                f"two distributions offer a plugin {entry.name!r}: {_owner(other)} and "
                f"{_owner(entry)}; uninstall one"
            )
        found[entry.name] = entry
    if CORE not in found:
        raise PluginError(
            "the built-in plugins are not installed: run `pip install -e .` in the checkout; "
            f"importing from source alone does not register them ({_version_or_missing()})"
        )
    return found


def left_out(entries: Iterable[EntryPoint], allowed: Iterable[str] | None) -> dict[str, str]:
    """Why plugins are not to be loaded, by name; the core's own always are.

    Args:
        entries: What is installed.
        allowed: Only these, whatever else is set. By default those that ``CIRCUITLAB_PLUGINS``
            lists, or all; without what is disabled, and with ``CIRCUITLAB_NO_PLUGINS`` without what
            does not come with CircuitLab.

    Raises:
        PluginError: the list of disabled plugins cannot be read.
    """
    names = {entry.name: entry for entry in entries if entry.name != CORE}
    if allowed is not None:
        wanted = set(allowed)
        return {name: "not asked for" for name in names if name not in wanted}
    reasons: dict[str, str] = {}
    listed = os.environ.get("CIRCUITLAB_PLUGINS")
    off = disabled()
    for name, entry in names.items():
        if listed is not None and name not in [word.strip() for word in listed.split(",")]:
            reasons[name] = "not listed in CIRCUITLAB_PLUGINS"
        elif name in off:
            reasons[name] = f"disabled; `circuitlab plugins enable {name}` takes it back"
        elif os.environ.get("CIRCUITLAB_NO_PLUGINS", "") not in ("", "0") and not _ours(entry):
            reasons[name] = "left out by --no-plugins"
    return reasons


def disabled() -> frozenset[str]:
    """Names of the plugins that were disabled.

    Raises:
        PluginError: the list cannot be read.
    """
    path = disabled_path()
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return frozenset()
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(
            f"the list of disabled plugins {str(path)!r} cannot be read: {error}; mend or remove it"
        ) from error
    return frozenset(line.strip() for line in lines if line.strip())


def set_disabled(name: str, off: bool) -> bool:
    """Disable a plugin, or enable it again; says whether that changed anything.

    Raises:
        PluginError: it is the core's own, is not installed, or the list cannot be written.
    """
    if name == CORE:
        raise PluginError(f"plugin {CORE!r} is the core's own: nothing works without it; keep it")
    before = disabled()
    # What was uninstalled while it was disabled can still be taken off the list.
    if name not in before and name not in (names := installed_plugins()):
        raise PluginError(f"plugin {name!r} is not installed; there are {', '.join(names)}")
    after = before | {name} if off else before - {name}
    path = disabled_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{path.name}.{os.getpid()}")
        written.write_text("".join(f"{line}\n" for line in sorted(after)), encoding="utf-8")
        written.replace(path)
    except OSError as error:
        raise PluginError(
            f"the list of disabled plugins {str(path)!r} cannot be written: {error}; list the "
            f"plugins you want in CIRCUITLAB_PLUGINS instead"
        ) from error
    return before != after


def disabled_path() -> Path:
    """Where the list of disabled plugins is: in ``$XDG_CONFIG_HOME``, or ``~/.config``."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(given) if Path(given).is_absolute() else Path(os.path.expanduser("~"), ".config")
    return folder / "circuitlab" / "disabled-plugins.txt"


def _ours(entry: EntryPoint) -> bool:
    return entry.dist is not None and entry.dist.name == "circuitlab"


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _version_or_missing() -> str:
    try:
        return f"circuitlab {distribution('circuitlab').version} is registered without entry points"
    except ModuleNotFoundError:
        return "no circuitlab distribution is registered"
