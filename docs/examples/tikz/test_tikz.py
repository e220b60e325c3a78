import re

from circuitlab_tikz import write_tikz

import circuitlab
from circuitlab.testing import tiny_model, toy_task


def test_every_component_and_edge_is_there(tmp_path):
    """A node for each component and a line for each effect, between the right two."""
    circuit = circuitlab.build_circuit(tiny_model(), toy_task(), top=9, allow_weak=True)
    circuitlab.write_circuit(circuit, tmp_path / "circuit.tikz", {".tikz": write_tikz})
    text = (tmp_path / "circuit.tikz").read_text("utf-8")
    names = dict(re.findall(r"rounded corners\] \((n\d+)\) at .* \{(.*)\};", text))
    assert sorted(names.values()) == sorted(circuit.nodes)
    drawn = [(names[a], names[b]) for a, b in re.findall(r"\((n\d+)\) --.* \((n\d+)\);", text)]
    assert sorted(drawn) == sorted((source, target) for source, target in circuit.edges())


def test_names_are_text(tmp_path):
    """A name that looks like TeX is written, not run."""
    circuit = circuitlab.CircuitGraph()
    circuit.add_component(r"\input{secret}_%", kind="head", layer=0)
    write_tikz(circuit, tmp_path / "x.tikz")
    text = (tmp_path / "x.tikz").read_text("utf-8")
    assert r"\textbackslash{}input\{secret\}\_\%" in text
