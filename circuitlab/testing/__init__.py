"""For the tests of a plugin: a tiny model, a task for it, a known circuit, and the contract itself.

``check_plugin`` is what ``circuitlab plugins check`` shows, and what the built-in plugins pass; run
it over your own::

    def test_contract():
        assert not [clause for clause in check_plugin("head-norms") if clause.verdict == "FAILS"]

``check_analysis`` holds one analysis to the same, on a model and a task of yours. Both look at what
``build_circuit`` and its readers count on, not at whether an analysis is right: for that compare it
with :func:`planted_circuit`, whose edges are known.
"""

from circuitlab.testing.analyses import check_analysis
from circuitlab.testing.clause import Clause
from circuitlab.testing.plugins import check_plugin
from circuitlab.testing.samples import planted_circuit, tiny_model, toy_task

__all__ = [
    "Clause",
    "check_analysis",
    "check_plugin",
    "planted_circuit",
    "tiny_model",
    "toy_task",
]
