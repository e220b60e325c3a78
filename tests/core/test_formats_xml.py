"""GraphML and GEXF: files of other programs, files that attack, and what networkx reads of ours."""

from __future__ import annotations

import time
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest
from format_samples import circuits, planted
from hypothesis import given, settings

from circuitlab.errors import GraphError
from circuitlab.export import read_circuit, write_circuit
from circuitlab.formats.gexf import gexf_text, parse_gexf
from circuitlab.formats.graphml import graphml_text, parse_graphml
from circuitlab.formats.markup import parse_xml
from circuitlab.graph import CircuitGraph

EFFECTS = [("m0", "logits", "", -2.0), ("a0.h1", "m0", "", 0.5), ("input", "a0.h1", "q", 0.25)]


def plain_graph() -> nx.MultiDiGraph:
    """A graph as someone without CircuitLab makes it: our names, weights, no kinds or layers."""
    graph = nx.MultiDiGraph()
    graph.add_edge("input", "a0.h1", weight=0.25, port="q")
    graph.add_edge("a0.h1", "m0", weight=0.5)
    graph.add_edge("m0", "logits", weight=-2.0)
    return graph


# --- what others write ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("suffix", [".graphml", ".gexf"])
def test_graph_of_networkx_is_read(suffix: str, tmp_path: Path) -> None:
    """Kinds, layers and heads are those the names say; the score is the weight."""
    path = tmp_path / f"a{suffix}"
    {".graphml": nx.write_graphml_xml, ".gexf": nx.write_gexf}[suffix](plain_graph(), path)
    circuit = read_circuit(path)
    assert list(circuit.effects()) == EFFECTS
    facts = {name: (d["kind"], d["layer"]) for name, d in circuit.nodes(data=True)}
    assert facts == {
        "input": ("input", 0), "a0.h1": ("head", 0), "m0": ("mlp", 0), "logits": ("logits", 1),
    }  # fmt: skip
    assert circuit.nodes["a0.h1"]["head"] == 1
    assert "as in the file" in circuit.graph["score"]


@pytest.mark.parametrize("suffix", [".graphml", ".gexf"])
def test_networkx_reads_ours(suffix: str, tmp_path: Path) -> None:
    """Every effect has its port and score there, every component its kind and layer."""
    circuit = planted()
    path = tmp_path / f"a{suffix}"
    write_circuit(circuit, path)
    if suffix == ".graphml":
        found = nx.read_graphml(path, force_multigraph=True)
    else:
        found = nx.read_gexf(path, version="1.3")
    effects = {(s, t, d["port"], d["score"]) for s, t, d in found.edges(data=True)}
    assert effects == set(circuit.effects())
    for name, data in circuit.nodes(data=True):
        assert (found.nodes[name]["kind"], found.nodes[name]["layer"]) == (
            data["kind"], data["layer"],
        )  # fmt: skip


def test_gexf_weighs_by_absolute_score() -> None:
    """Gephi lays out by weight and takes none below 0; parallel edges differ in kind."""
    root = ElementTree.fromstring(gexf_text(planted()))
    edges = root.iter("{http://gexf.net/1.3}edge")
    found = {(e.get("source"), e.get("target"), e.get("kind"), e.get("weight")) for e in edges}
    assert found == {
        (s, t, port or None, repr(abs(score))) for s, t, port, score in planted().effects()
    }


@settings(max_examples=40, deadline=None)
@given(circuit=circuits())
def test_any_circuit_is_well_formed_xml(circuit: CircuitGraph) -> None:
    """An independent parser takes it, with one id for each component and no markup of theirs."""
    for text in (graphml_text(circuit), gexf_text(circuit)):
        root = ElementTree.fromstring(text)
        nodes = [e for e in root.iter() if e.tag.endswith("}node")]
        assert len({node.get("id") for node in nodes}) == len(circuit)
        known = {"gexf", "meta", "creator", "description", "graph", "attributes", "attribute",
                 "nodes", "node", "edges", "edge", "attvalues", "attvalue", "graphml", "key",
                 "data"}  # fmt: skip
        assert {e.tag.partition("}")[2] for e in root.iter()} <= known


GRAPHML = """<graphml xmlns="http://graphml.graphdrawing.org/xmlns">
<key id="w" for="edge" attr.name="weight" attr.type="double"><default>0.5</default></key>
<key id="k" for="node" attr.name="kind" attr.type="string"><default>feature</default></key>
<key id="l" for="node" attr.name="layer" attr.type="int"/>
<key id="d" for="node" yfiles.type="nodegraphics"/>
<graph edgedefault="directed">
<node id="x"><data key="l">1</data><data key="d"><shape/></data></node>
<node id="y"><data key="l">2</data></node>
<edge source="x" target="y"/>
</graph></graphml>"""


def test_defaults_of_graphml_hold_and_drawing_is_passed_over() -> None:
    """What a key says by default stands where an element says nothing."""
    circuit = parse_graphml(GRAPHML.encode())
    assert dict(circuit.nodes["x"]) == {"kind": "feature", "layer": 1}
    assert list(circuit.effects()) == [("x", "y", "", 0.5)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_encodings_that_xml_declares_are_read(encoding: str) -> None:
    """A file in another encoding than ours, as its declaration says."""
    text = GRAPHML.replace('"x"', '"é"')
    data = f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(encoding)
    assert "é" in parse_graphml(data)


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        ('edgedefault="directed"', 'edgedefault="undirected"', "undirected"),
        ('<edge source="x"', '<edge directed="false" source="x"', "undirected"),
        ('target="y"', 'target="z"', "no node is called 'z'"),
        ('"l">1<', '"l">one<', "'layer' is 'one', which is no int"),
        ('"l">1<', '"q">1<', "key 'q' has no <key>"),
        ("<default>0.5</default>", "", "neither score nor weight"),
        ("<default>0.5</default>", "<default>nan</default>", "'weight' is 'nan'"),
        ("<default>0.5</default>", "<default>1e999</default>", "'weight' is '1e999'"),
        ("<default>feature</default>", "", "component 'x' has no kind"),
        ('<data key="l">1</data>', "", "component 'x' has no layer"),
        ('<node id="y">', '<node id="x">', "'x' is there twice"),
        ("</graph>", "</graph><graph/>", "2 graphs"),
        ("</node>\n<node", "<graph/></node><node", "within nodes"),
        ("</graph>", '<edge source="y" target="x"/></graph>', "cycle"),
        ("</graph>", '<edge source="x" target="y"/></graph>', "there twice"),
    ],
)
def test_graphml_that_is_no_circuit_says_why(old: str, new: str, fact: str) -> None:
    """Offender and fact in one line."""
    assert old in GRAPHML
    with pytest.raises(GraphError, match=fact):
        parse_graphml(GRAPHML.replace(old, new).encode())


GEXF = """<gexf xmlns="http://www.gexf.net/1.2draft" version="1.2">
<graph defaultedgetype="directed">
<attributes class="node"><attribute id="0" title="kind" type="string"/>
<attribute id="1" title="layer" type="integer"/></attributes>
<nodes><node id="5" label="five"><attvalues><attvalue for="0" value="feature"/>
<attvalue for="1" value="0"/></attvalues></node><node id="logits" label="logits"/></nodes>
<edges><edge id="0" source="5" target="logits" weight="1.5"/></edges></graph></gexf>"""


def test_gexf_of_gephi_is_read() -> None:
    """Ids are names, labels stay beside them, the weight is the score."""
    circuit = parse_gexf(GEXF.encode())
    assert list(circuit.effects()) == [("5", "logits", "", 1.5)]
    assert circuit.nodes["5"] == {"kind": "feature", "layer": 0, "label": "five"}


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        ('defaultedgetype="directed"', "", "undirected"),
        ('for="0"', 'for="7"', "attribute '7'"),
        ('weight="1.5"', 'weight="heavy"', "'weight' is 'heavy'"),
        ('target="logits"', 'target="nowhere"', "no node is called 'nowhere'"),
        ("<gexf", "<gefx", "not XML"),
    ],
)
def test_gexf_that_is_no_circuit_says_why(old: str, new: str, fact: str) -> None:
    """Offender and fact in one line."""
    assert old in GEXF
    with pytest.raises(GraphError, match=fact):
        parse_gexf(GEXF.replace(old, new).encode())


# --- attacks --------------------------------------------------------------------------------------


def laughs(levels: int, many: int) -> bytes:
    """Entities of entities: ``many ** levels`` times three letters."""
    lines = ['<!ENTITY l0 "lol">']
    lines += [f'<!ENTITY l{i} "{f"&l{i - 1};" * many}">' for i in range(1, levels + 1)]
    return f"<!DOCTYPE g [{''.join(lines)}]><graphml>&l{levels};</graphml>".encode()


BOMBS = {
    "billion laughs": laughs(9, 10),
    "quadratic blowup": b'<!DOCTYPE g [<!ENTITY a "%b">]><gexf>%b</gexf>'
    % (b"a" * 50_000, b"&a;" * 50_000),
    "file": b'<!DOCTYPE g [<!ENTITY x SYSTEM "file:///etc/hostname">]><graphml>&x;</graphml>',
    "network": b'<!DOCTYPE g SYSTEM "http://localhost:1/evil.dtd"><gexf/>',
    "parameter": b'<!DOCTYPE g [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]><gexf/>',
}


def test_entities_would_expand() -> None:
    """The standard parser does expand entities: the documents below are no strawmen."""
    assert ElementTree.fromstring(laughs(2, 10)).text == "lol" * 100


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("suffix", [".graphml", ".gexf"])
def test_document_types_are_refused_at_once(name: str, suffix: str, tmp_path: Path) -> None:
    """Nothing is expanded or fetched, and the message names the remedy."""
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(BOMBS[name])
    start = time.perf_counter()
    with pytest.raises(GraphError, match=r"bomb.*document type.*<!DOCTYPE") as caught:
        read_circuit(path)
    assert time.perf_counter() - start < 1
    assert "root:" not in str(caught.value)


def test_undefined_entities_are_refused() -> None:
    """A reference without a definition is no text."""
    with pytest.raises(GraphError, match="undefined entity"):
        parse_xml(b"<graphml>&lol;</graphml>")


def test_deep_nesting_is_refused() -> None:
    """A hundred thousand elements within one another do not reach the stack."""
    with pytest.raises(GraphError, match="nested more than 100 deep"):
        parse_xml(b"<a>" * 100_000 + b"</a>" * 100_000)
    parse_xml(b"<a>" * 100 + b"</a>" * 100)


def test_text_of_strangers_is_data(tmp_path: Path) -> None:
    """JSON in an attribute of another program's file stays text."""
    path = tmp_path / "a.graphml"
    path.write_text(GRAPHML.replace(">feature<", ">[1, 2]<").replace('"k"', '"json0"'), "utf-8")
    assert read_circuit(path).nodes["x"]["kind"] == "[1, 2]"
