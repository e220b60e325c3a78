"""Gates in a model: the hand-made ones, redundancy, series, and how a circuit shows them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import path_oracles
import pytest
from circuitlab_path_patching.effects import Setting, edge_circuit, node_circuit
from circuitlab_path_patching.gates import drawing as gate_graph
from circuitlab_path_patching.gates import finding as gates
from circuitlab_path_patching.gates.composition import composition
from circuitlab_path_patching.gates.finding import add_gates
from circuitlab_path_patching.gates.groups import group_of
from circuitlab_path_patching.gates.mixtures import mixtures
from circuitlab_path_patching.panels import add_panels
from gate_settings import BITS, EXACT, MODES, bundled, random_setting
from torch import Tensor

from circuitlab import CircuitGraph, Edge, OptionError, Task, load_model, write_circuit, zoo
from circuitlab.symbols import SYMBOLS

GATES = {"gate-and": "AND", "gate-or": "OR", "gate-add": "ADD", "gate-xor": "XOR"}


def gates_of(
    setting: Setting, groups: str | None = None, *, nodes: bool = False, automatic: bool = True
) -> CircuitGraph:
    circuit = (node_circuit if nodes else edge_circuit)(setting, top=40)
    add_gates(setting, circuit, automatic=automatic, groups=groups)
    circuit.validate()
    circuit.to_json()
    return circuit


def named(circuit: CircuitGraph, *members: str) -> dict[str, Any]:
    """The entry of the group of these members."""
    (entry,) = (e for e in circuit.graph["gates"] if e["members"] == list(members))
    return dict(entry)


# --- the hand-made gates --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["noise", "denoise", "both"])
@pytest.mark.parametrize(
    ("name", "noise", "denoise", "between"),
    [("gate-and", 1, 0, 1), ("gate-or", 0, 1, -1), ("gate-add", 0.5, 0.5, 0),
     ("gate-xor", 1, -1, 2)],
)  # fmt: skip
def test_gate_table_is_exact(
    name: str, noise: float, denoise: float, between: float, mode: Any
) -> None:
    """Shares that one member loses and restores, and the interaction; found without being named.

    XOR is told from crossed contrasts: on off against off on, where each bit alone ends the yes.
    """
    # In one direction alone, members of an OR or an AND do nothing by themselves.
    found = mode == "both"
    text = None if found else "a0.0>m0 a0.1>m0"
    circuit = gates_of(bundled(name, mode=mode), text, automatic=found)
    entry = named(circuit, "a0.h0>m0", "a0.h1>m0")
    assert entry["type"] == GATES[name]
    assert set(entry["types"].values()) == {GATES[name]}
    assert entry["crossed"] == (name == "gate-xor")
    assert entry["noise"] == pytest.approx([noise] * 2, abs=1e-3)
    assert entry["denoise"] == pytest.approx([denoise] * 2, abs=1e-3)
    assert entry["interaction"] == pytest.approx(between, abs=1e-3)
    assert entry["dividends"]["a0.h0>m0+a0.h1>m0"] == pytest.approx(between, abs=1e-3)
    assert (entry["fit"], entry["support"]) == (pytest.approx(1, abs=1e-5), 1)
    # No other group of the circuit is called a gate.
    others = [e["type"] for e in circuit.graph["gates"] if e["name"] != entry["name"]]
    assert not set(others) & set(GATES.values())
    words = circuit.graph["findings"]["gates"]
    assert words.startswith(f"{GATES[name]} a0.h0 + a0.h1 → m0, interaction {between:+.2f}")
    assert ("crossed contrasts" in words) == entry["crossed"]


@pytest.mark.parametrize("name", GATES)
def test_gate_stands_between_members_and_reader(name: str, tmp_path: Path) -> None:
    """Its arrows are those of its members; the effects they stand for name it."""
    circuit = gates_of(bundled(name))
    (gate,) = (n for n, data in circuit.nodes(data=True) if data["kind"] == "gate")
    data = circuit.nodes[gate]
    assert [entry["name"] for entry in circuit.graph["gates"] if entry["drawn"]] == [gate]
    assert (data["gate"], data["members"]) == (GATES[name], ["a0.h0>m0", "a0.h1>m0"])
    assert data["gate"] in SYMBOLS
    for head in ("a0.h0", "a0.h1"):
        plain, arrow = circuit.edges[head, "m0", ""], circuit.edges[head, gate, ""]
        assert arrow["score"] == pytest.approx(plain["score"], abs=1e-6)
        assert plain["gate"] == gate
        assert arrow["redundant"] == plain.get("redundant", False) == (name == "gate-or")
    # All members together end the yes, in whichever contrast.
    assert circuit.edges[gate, "m0", ""]["score"] == pytest.approx(-1, abs=1e-3)
    assert not any("gate" in circuit.edges[e[:3]] for e in circuit.effects() if e[1] == "logits")
    assert circuit.graph["score"].endswith(gate_graph._SCORE)
    add_panels(circuit, "logit-difference")
    write_circuit(circuit, tmp_path / "gates.plot.svg")


@pytest.mark.parametrize("name", GATES)
def test_nodes_form_the_same_gates(name: str) -> None:
    """Heads patched whole act on the MLP alone, so they have the tables of their edges."""
    setting = bundled(name)
    for mode in MODES:
        nodes = mixtures(setting, ["a0.h0", "a0.h1"], mode=mode)
        assert float((nodes - mixtures(setting, BITS, mode=mode)).abs().max()) < 1e-6
    circuit = gates_of(setting, nodes=True)
    entry = named(circuit, "a0.h0", "a0.h1")
    assert entry["type"] == GATES[name]
    assert circuit.has_edge("a0.h0", entry["name"])
    assert circuit.has_edge(entry["name"], "logits")
    assert circuit.edges["a0.h0", "logits", ""]["gate"] == entry["name"]


def test_shares_are_those_of_the_effects() -> None:
    """What a gate says of a member is what patching the member alone gives, in both directions."""
    setting = bundled("induction", n_pairs=6)
    circuit = gates_of(setting, "a1.0>logits a1.1>logits m1>logits", automatic=False)
    (entry,) = circuit.graph["gates"]
    for place, source in enumerate(("a1.h0", "a1.h1", "m1")):
        plain = circuit.edges[source, "logits", ""]
        for key in ("noise", "denoise", "noise_effect", "denoise_effect"):
            assert entry[key][place] == pytest.approx(plain[key], rel=1e-4)


def test_one_bit_at_a_time_is_crossed_only_if_needed() -> None:
    """A pair that changes both bits tells; it alone is used, and there is nothing to cross."""
    task = next(task for task in zoo.tasks() if task.name == "gate-xor")
    model = load_model("gate-xor")
    both = replace(task.pairs[0], clean="on off =", corrupt="off on =")
    pairs = model.encode(Task("both", (both, *task.pairs)))
    circuit = edge_circuit(Setting(model, pairs))
    add_gates(Setting(model, pairs), circuit, automatic=False, groups="a0.0>m0 a0.1>m0")
    (entry,) = circuit.graph["gates"]
    assert (entry["type"], entry["crossed"], entry["n_pairs"]) == ("XOR", False, 1)
    alone = model.encode(Task("one", task.pairs[:1]))
    circuit = edge_circuit(Setting(model, alone))
    add_gates(Setting(model, alone), circuit, automatic=False, groups="a0.0>m0 a0.1>m0")
    (entry,) = circuit.graph["gates"]
    assert (entry["type"], entry["crossed"]) == ("SOLE", False)


# --- redundancy and series ------------------------------------------------------------------------


def test_keys_of_the_induction_heads_are_redundant() -> None:
    """What the heads of layer 1 read as keys: each alone is half of what all do together.

    Joint and single effects are those of plain edge patching.
    """
    setting = bundled("induction", n_pairs=24)
    circuit = gates_of(setting)
    entry = named(circuit, *(f">a1.h{head}:k" for head in range(4)))
    wiring = setting.model.wiring
    keys = [[e for e in wiring.edges if (e.target, e.port) == (f"a1.h{h}", "k")] for h in range(4)]
    (patcher,) = setting.patchers("noise")
    scores = patcher.sets([*keys, [edge for part in keys for edge in part]])
    *singles, joint = (scores - patcher.base_score).mean(1).tolist()
    assert entry["joint"] == pytest.approx(joint, rel=1e-4)
    assert entry["sum_of_singles"] == pytest.approx(sum(singles), rel=1e-4)
    assert entry["relation"] == "redundant"
    assert entry["redundancy"] == pytest.approx(1 - sum(singles) / joint, rel=1e-4)
    effect = float(setting.change().mean())
    assert joint / effect > 0.9
    assert sum(singles) / effect < 0.7
    assert "k of a1.h0, a1.h1, a1.h2, a1.h3: singles" in circuit.graph["findings"]["redundancy"]
    keys_drawn = [circuit.edges[e[:3]].get("redundant") for e in circuit.effects() if e[2] == "k"]
    assert any(keys_drawn)
    # The edges that leave the previous-token head are redundant, and the head itself is not.
    leaving = named(circuit, *(f"a0.h3>a1.h{head}:k" for head in range(4)))
    assert leaving["relation"] == "redundant"
    others = [entry for entry in circuit.graph["gates"] if "a0.h3" in entry["members"]]
    assert others
    for entry in others:
        assert entry["relation"] != "redundant"
        assert entry["noise"][entry["members"].index("a0.h3")] > 0.95
    assert not circuit.edges["input", "a0.h3", "v"].get("redundant")


def test_series_and_parallel_are_told_apart() -> None:
    """Of the induction circuit all is lost with the edge between its heads, of a sum nothing."""
    setting = bundled("hand-induction", n_pairs=8)
    chain = group_of(["a0.h0", "a1.h0"], setting.model.wiring)
    for mode in MODES:
        found = composition(setting, chain, mode)
        assert found.serial == pytest.approx(1, abs=1e-5)
        assert found.interval == pytest.approx((1, 1), abs=1e-5)
        assert found.bypass == pytest.approx(0, abs=1e-5)
    setting = bundled("gate-add")
    wiring = setting.model.wiring
    side_by_side = composition(setting, group_of(["a0.h0", "a0.h1"], wiring), "noise")
    assert (side_by_side.serial, side_by_side.internal, side_by_side.bypass) == (0, 0, 0)
    assert side_by_side.joint == pytest.approx(-1, abs=1e-5)
    stacked = composition(setting, group_of(["a0.h0", "m0"], wiring), "noise")
    # The head does all it does through the MLP; the other head does the other half.
    assert stacked.serial == pytest.approx(0.5, abs=1e-5)
    assert stacked.bypass == pytest.approx(0, abs=1e-5)
    with pytest.raises(OptionError, match="asked of nodes"):
        composition(setting, group_of(BITS, wiring), "noise")


def test_composition_is_three_sets_of_edges() -> None:
    """On a random model, by brute force: edges inside, edges past, all edges out."""
    setting, module = random_setting()
    pairs = setting.pairs
    runs = path_oracles.runs(
        module, pairs.clean.ids, pairs.corrupt.ids, pairs.clean.mask.long(), mode="noise"
    )
    group = group_of(["a0.h1", "m0", "a1.h0"], setting.model.wiring)
    inside = [(s, t, p) for s, t, p in runs.model.edges() if {s, t} <= {"a0.h1", "m0", "a1.h0"}]
    every = [e for e in runs.model.edges() if e[0] in ("a0.h1", "m0", "a1.h0")]
    past = [e for e in every if e not in inside and e[0] != "a1.h0"]

    def effect(edges: Any) -> float:
        logits = path_oracles.patched_edges(runs, edges)
        clean = runs.base.logits
        return float((pairs.score(logits, clean) - pairs.score(clean, clean)).mean())

    found = composition(setting, group, "noise")
    assert found.internal == pytest.approx(effect(inside), abs=EXACT)
    assert found.bypass == pytest.approx(effect(past), abs=EXACT)
    assert found.joint == pytest.approx(effect(every), abs=EXACT)
    assert found.serial == pytest.approx(effect(inside) / effect(every), abs=1e-6)
    assert composition(setting, group, "noise", least=1e6).serial is None


def test_a_chain_is_no_gate() -> None:
    """Breaking either head breaks all and restoring either restores all: no AND, no OR."""
    circuit = gates_of(bundled("hand-induction", n_pairs=8))
    entry = named(circuit, "a0.h0", "a1.h0")
    assert (entry["type"], entry["types"]) == ("SERIES", {"noise": "AND", "denoise": "OR"})
    assert entry["composition"]["serial"] == pytest.approx(1, abs=1e-5)
    assert not [n for n, data in circuit.nodes(data=True) if data["kind"] == "gate"]
    findings = circuit.graph["findings"]
    assert findings["gates"].startswith("none with a name")
    assert findings["composition"].startswith("a0.h0 + a1.h0: 100% of what they do")


# --- the circuit ----------------------------------------------------------------------------------


def test_no_groups_is_said() -> None:
    """Where nothing is strong enough to look at, there are no gates, and that is said."""
    setting, _ = random_setting()
    circuit = edge_circuit(setting, top=1)
    for name in [name for name in circuit if name not in ("input", "logits")]:
        circuit.remove_node(name)
    add_gates(setting, circuit, automatic=True, groups=None)
    assert circuit.graph["gates"] == []
    assert circuit.graph["findings"]["gates"] == "no groups to look in"


def test_named_groups_come_first_and_need_no_circuit() -> None:
    """They are listed in their order, whatever the circuit kept, and once each."""
    setting = bundled("gate-and")
    circuit = edge_circuit(setting, senders="m0")
    text = "a0.1>m0 a0.0>m0; a0.0 m0; a0.1>m0 a0.0>m0"
    add_gates(setting, circuit, automatic=True, groups=text)
    members = [entry["members"] for entry in circuit.graph["gates"]]
    assert members[:2] == [["a0.h1>m0", "a0.h0>m0"], ["a0.h0", "m0"]]
    assert members.count(members[0]) == 1
    assert circuit.has_edge("a0.h1", "gate1")
    assert circuit.nodes["a0.h1"]["kind"] == "head"
    circuit.validate()


def test_group_of_inputs_is_drawn_behind_what_reads() -> None:
    """Edges out of one source, and inputs, are known by their targets."""
    setting = bundled("gate-and")
    circuit = gates_of(setting, "input>a0.0:v input>a0.1:v", automatic=False)
    assert circuit.nodes["gate1"]["gate"] == "AND"
    assert {s for s, _ in circuit.in_edges("gate1")} == {"a0.h0", "a0.h1"}
    assert circuit.edges["gate1", "logits", ""]["kind"] == "total"
    assert "gate" not in circuit.edges["input", "a0.h0", "v"]


@pytest.mark.parametrize("name", ["gate-or", "gate-xor"])
def test_two_members_of_a_larger_group_are_found(name: str) -> None:
    """The bits and what the MLP makes of them are no gate; the gate of the bits is found."""
    setting = bundled(name)
    group = group_of([*BITS, Edge("m0", "logits")], setting.model.wiring)
    whole, *within = gates._automatic(setting, [group], scale=1.0)
    assert not whole.named
    (bits,) = within
    assert bits.group.names == ["a0.h0>m0", "a0.h1>m0"]
    assert (bits.gate.type, bits.measured.crossed) == (GATES[name], name == "gate-xor")
    for mode in MODES:
        direct = mixtures(setting, BITS, mode=mode)
        assert float((bits.measured.own[mode].values - direct).abs().max()) < 1e-6


def test_same_options_same_circuit() -> None:
    """Two runs give the same bytes."""
    setting, _ = random_setting()
    assert gates_of(setting).to_json() == gates_of(setting).to_json()


def means(table: Tensor) -> list[float]:
    return [float(row) for row in table.mean(1)]


def test_entry_is_what_its_table_says() -> None:
    """Table, dividends, joint effect and singles of a group of a random model."""
    setting, _ = random_setting()
    circuit = gates_of(setting, "a0.0>m0 m0>m1 a0.1>logits", automatic=False)
    (entry,) = circuit.graph["gates"]
    table = mixtures(
        setting,
        [Edge("a0.h0", "m0"), Edge("m0", "m1"), Edge("a0.h1", "logits")],
        mode="noise" if entry["background"] == "clean" else "denoise",
    )
    f = means(table)
    assert [row[0] for row in entry["table"]] == [
        "000", "100", "010", "110", "001", "101", "011", "111",
    ]  # fmt: skip
    assert [row[1] for row in entry["table"]] == pytest.approx(f, abs=EXACT)
    assert all(low <= mean <= high for _, mean, low, high in entry["table"])
    assert entry["joint"] == pytest.approx(f[0] - f[7], abs=EXACT)
    assert entry["sum_of_singles"] == pytest.approx(f[6] + f[5] + f[3] - 3 * f[7], abs=EXACT)
    assert sum(entry["dividends"].values()) == pytest.approx(f[7] - f[0], abs=EXACT)
    assert entry["dividends"]["m0>m1"] == pytest.approx(f[2] - f[0], abs=EXACT)


def test_batches_change_nothing() -> None:
    """Neither tables nor anything that is said of them."""
    setting, _ = random_setting()
    text = "a0.0 a0.1; a0.0>m0 a0.1>m0; >a1.*:k"
    whole = gates_of(setting, text)
    for size in (1, 2):
        split = replace(setting, batch_size=size)
        table = mixtures(split, ["a0.h0", "m0"], mode="denoise")
        assert float((table - mixtures(setting, ["a0.h0", "m0"], mode="denoise")).abs().max()) < (
            EXACT
        )
        circuit = gates_of(split, text)
        assert list(circuit.nodes) == list(whole.nodes)
        for one, other in zip(circuit.graph["gates"], whole.graph["gates"], strict=True):
            assert (one["members"], one["types"]) == (other["members"], other["types"])
            assert one["table"] == [[r[0], *map(near, r[1:])] for r in other["table"]]


def near(value: float) -> Any:
    return pytest.approx(value, abs=EXACT)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_other_ablations_have_gates_of_the_clean_run(ablation: Any) -> None:
    """Zero and mean ablation have no run of their own: everything else is clean."""
    setting, _ = random_setting(mode="noise", ablation=ablation)
    circuit = gates_of(setting)
    assert circuit.graph["gates"]
    assert {entry["background"] for entry in circuit.graph["gates"]} == {"clean"}
