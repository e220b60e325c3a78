"""check_plugin: every rule, over everything that one installed plugin offers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from circuitlab.entries import installed_plugins
from circuitlab.errors import OptionError, PluginError
from circuitlab.offers import Analysis, Command
from circuitlab.options import Option, check_values
from circuitlab.registry import Registry
from circuitlab.testing.analyses import RULES, Trial
from circuitlab.testing.clause import Clause, judge
from circuitlab.testing.conduct import CONDUCT
from circuitlab.testing.others import (
    check_annotator,
    check_command,
    check_exporter,
    check_families,
    check_task,
)
from circuitlab.testing.processes import check_flags, check_loading

#: Values of options, by the name of the analysis or command.
Settings = Mapping[str, Mapping[str, Any]]


def check_plugin(name: str, options: Settings | None = None) -> list[Clause]:
    """Hold an installed plugin to everything CircuitLab expects of one.

    * It loads in a process of its own: in time, without torch, without a word on stdout, and no
      other plugin has its names.
    * Each analysis: :func:`check_analysis`, one rule at a time; its flags and their values reach
      it, and it reads them; stopped and resumed it gives the same circuit; on a host it gives the
      same scores and sends plain data; where its scores are of edges, the planted circuit is found.
    * Formats, commands, tasks, annotations and families: they work, twice the same.

    Args:
        name: Of the plugin, as ``circuitlab plugins`` lists it.
        options: Values for the options of its analyses and commands, by their names, to make them
            quick or because they need some; text is read as on the command line.

    Returns:
        Every clause: it holds, FAILS with a reason, or is not checked with a reason.

    Raises:
        PluginError: no such plugin is installed, or two distributions claim it.
        OptionError: there is no such analysis, command, option or value.
    """
    if name not in (names := installed_plugins()):
        raise PluginError(f"plugin {name!r} is not installed; there are {', '.join(names)}")
    clauses = list(check_loading(name))
    if clauses[0].verdict == "FAILS":
        return clauses
    registry = Registry.load([name])
    given = _given(registry, name, options or {})
    with _one_thread():
        return [*clauses, *_offers(registry, name, given)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """On models as small as these a second thread costs more in waiting than it does work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _offers(registry: Registry, name: str, given: dict[str, dict[str, Any]]) -> Iterator[Clause]:
    info = registry.plugins[name]
    flags: dict[tuple[str, ...], Sequence[Option]] = {}
    for analysis in registry.analyses.values():
        if analysis.plugin == name:
            yield from _analysis(analysis, given.get(analysis.name, {}))
            flags["trace", analysis.name] = analysis.options
    for command in registry.commands.values():
        if command.plugin == name:
            asked = command.name in given
            values = given.get(command.name, {})
            yield from check_command(command, values, registry, asked=asked)
            flags[tuple(command.name.split(" "))] = command.options
    yield from check_flags(name, flags)
    for kind, _, key in (offer.partition(":") for offer in info.offers):
        if kind == "exporters":
            yield from check_exporter(key, vars(registry.exporters[key])["__wrapped__"])
        elif kind == "tasks":
            yield from check_task(registry.tasks[key])
    if "annotate_circuit" in info.hooks:
        yield from check_annotator(name, registry)
    if "adapt_architecture" in info.hooks:
        yield from check_families(registry)


def _analysis(analysis: Analysis, given: dict[str, Any]) -> Iterator[Clause]:
    trial = Trial(analysis.name, analysis.function, given, pair_scores=analysis.pair_scores)
    ran = False
    for number, (rule, check) in enumerate((RULES | CONDUCT).items()):
        if number > 1 and not ran:
            break
        clause = judge(trial.label, rule, lambda check=check: check(trial))  # type: ignore[misc]  # mypy cannot infer a lambda's default
        ran = clause.verdict == "holds" if number == 1 else ran
        yield clause


def _given(registry: Registry, name: str, options: Settings) -> dict[str, dict[str, Any]]:
    """Values by offer, as the options read them."""
    offers: dict[str, Analysis | Command] = {**registry.analyses, **registry.commands}
    own: dict[str, tuple[Option, ...]] = {
        key: offer.options for key, offer in offers.items() if offer.plugin == name
    }
    found = {}
    for key, values in options.items():
        if key not in own:
            raise OptionError(
                f"plugin {name!r} offers no analysis or command {key!r}; there are {', '.join(own)}"
            )
        known = {option.name: option for option in own[key]}
        read = {word: _read(known.get(word), value) for word, value in values.items()}
        check_values(own[key], read, repr(key))
        found[key] = read
    return found


def _read(option: Option | None, value: Any) -> Any:
    """A value; text as the command line reads it, where the option takes no text."""
    if option is None or not isinstance(value, str) or option.accepts(value):
        return value
    return option.parse(value)
