"""Circuits as TikZ, for papers that set their figures in their own type."""

import circuitlab

_ESCAPES = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@circuitlab.hookimpl
def register_exporters(register):
    register(".tikz", write_tikz)


def write_tikz(circuit, path):
    """Layers upwards, components of a layer side by side, lines as wide as their scores."""
    lines = [r"\begin{tikzpicture}[x=18mm, y=14mm, >=stealth]"]
    columns, places = {}, {}
    order = {"input": 0, "head": 1, "mlp": 2, "logits": 3}
    for name, data in sorted(circuit.nodes(data=True)):
        row = 2 * data["layer"] + order.get(data["kind"], 1)
        columns[row] = columns.get(row, -1) + 1
        places[name] = f"n{len(places)}"
        at = f"({columns[row]}, {row})"
        lines.append(rf"\node[draw, rounded corners] ({places[name]}) at {at} {{{_text(name)}}};")
    largest = max((abs(score) for *_, score in circuit.effects()), default=1.0) or 1.0
    for source, target, port, score in circuit.effects():
        colour = "blue" if score < 0 else "orange"
        style = f"->, {colour}, line width={0.3 + 1.7 * abs(score) / largest:.2f}pt"
        label = rf" node[midway, font=\tiny] {{{_text(port)}}}" if port else ""
        lines.append(rf"\draw[{style}] ({places[source]}) --{label} ({places[target]});")
    path.write_text("\n".join([*lines, r"\end{tikzpicture}", ""]), encoding="utf-8")


def _text(name):
    """A name that TeX reads as nothing but text."""
    return "".join(_ESCAPES.get(c, c if c.isprintable() else "?") for c in name)
