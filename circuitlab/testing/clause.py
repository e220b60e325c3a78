"""Clause: one thing that must hold of a plugin, and whether it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from circuitlab.errors import ModelError, OptionError, RemoteError, TaskError
from circuitlab.progress import report
from circuitlab.registry import describe

Verdict = Literal["holds", "FAILS", "not checked"]

#: With these an analysis refuses what it is given here; that is no fault of it.
_REFUSALS = (OptionError, TaskError, ModelError, RemoteError)


@dataclass(frozen=True, slots=True)
class Clause:
    """What :func:`check_plugin` found about one rule.

    Attributes:
        subject: What it is about: the plugin, or one of its offers.
        rule: What must hold.
        verdict: Whether it does.
        reason: Why not, and what to do; empty where it holds.
    """

    subject: str
    rule: str
    verdict: Verdict
    reason: str = ""


class BrokenError(AssertionError):
    """A rule does not hold; the text is the reason."""


class NotCheckedError(Exception):
    """A rule says nothing here; the text is why."""


def judge(subject: str, rule: str, check: Callable[[], object]) -> Clause:
    """Try one rule; whatever a plugin raises is a verdict."""
    report(f"{subject}: {rule}")
    try:
        check()
    except (NotCheckedError, BrokenError) as found:
        verdict: Verdict = "FAILS" if isinstance(found, BrokenError) else "not checked"
        return Clause(subject, rule, verdict, str(found))
    except _REFUSALS as refusal:
        reason = f"it refuses the sample: {refusal}; give options that fit by --set"
        return Clause(subject, rule, "not checked", reason)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a plugin may raise anything)
        return Clause(subject, rule, "FAILS", f"it raised {describe(error)}")
    return Clause(subject, rule, "holds")
