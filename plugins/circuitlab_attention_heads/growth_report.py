"""What ``norm-growth`` says and shows: findings in words, and panels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuitlab import Curve, Curves, Heatmap
from circuitlab_attention_heads.attenuation import readers
from circuitlab_attention_heads.growth import EXACT

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, TracedModel
    from circuitlab_attention_heads.growing import Measured
    from circuitlab_attention_heads.growth import Growth

#: Components that the heat map shows.
SHOWN = 30
#: What series of norms are called.
WRITES = {"attention": "attention writes", "mlp": "MLP writes"}
WEIGHTS = {"ov": "W_OV", "o": "W_O", "out": "W_out of MLPs", "q": "W_Q", "k": "W_K"}
READING = ("q", "k")


def findings(model: TracedModel, found: Measured, lens: dict[str, Any]) -> dict[str, str]:
    """What the terminal says: one line for each label."""
    stream = found.growth["stream"]
    first, last = stream.means[0], stream.means[-1]
    assert first is not None
    assert last is not None
    ends = f"norm {first:.3g} at the input, {last:.3g} at the end"
    said = {"residual stream": f"{_rate_text(stream, 'prompts')}; {ends}"}
    if model.n_layers == 1:
        said["residual stream"] = f"×{last / first:.4g} over its one layer; {ends}"
    for name, label in WRITES.items():
        cosines = [cosine for cosine in found.norms.cosines(name) if cosine is not None]
        if cosines:
            low, high = (f"{round(end, 2) + 0.0:+.2f}" for end in (min(cosines), max(cosines)))
            span = low if low == high else f"{low} to {high} by layer"
            rate = _rate_text(found.growth[name], "prompts")
            said[label] = f"{rate}; cosine with the stream {span}"
    if model.n_layers > 1:
        for label, reading in (("weights that write", False), ("weights that read", True)):
            rates = [
                f"{name} {_rate_text(found.growth[key], 'layers')}"
                for key, name in WEIGHTS.items()
                if (key in READING) == reading and key in found.growth
            ]
            said |= {label: "; ".join(rates)} if rates else {}
    said["attenuation"] = _attenuation_text(model, found.attenuation.size())
    said["logit lens"] = _lens_text(lens)
    if bias := float(found.shares[-1].mean()):
        said["biases"] = f"{bias:+.3f} of the final stream; all shares sum to 1"
    return said


def _rate_text(growth: Growth, over: str) -> str:
    """``×1.045 per layer (95 % over layers: 1.04 to 1.05), R² 0.99``."""
    rate, n_layers = growth.rate, sum(mean is not None for mean in growth.means)
    if rate is None:
        return "one layer, no rate" if n_layers else "nothing written, no rate"
    text = f"×{rate.factor:.4g} per layer"
    if n_layers == EXACT:
        return f"{text} (two layers, no interval)"
    interval = rate.interval
    if interval is None:
        text += " (one prompt, no interval)"
    else:
        text += f" (95 % over {over}: {interval[0]:.4g} to {interval[1]:.4g})"
    return text if rate.fit is None else f"{text}, R² {rate.fit:.2f}"


def _attenuation_text(model: TracedModel, size: Tensor) -> str:
    """How large writes are where they are first read, and what is left of that at the logits.

    Of the same components: those of layers before the last, where there is more than one.
    """
    wiring, parts = model.wiring, []
    for kind, label in (("head", "a head"), ("mlp", "an MLP")):
        ends = [
            (float(size[row, layer + 1]), float(size[row, -1]))
            for row, (kind_of, layer, _) in enumerate(map(wiring.component, wiring.sources))
            if kind_of == kind and layer < max(1, model.n_layers - 1) and float(size[row, -1]) > 0
        ]
        if ends:
            first, last = (sum(part) / len(ends) for part in zip(*ends, strict=True))
            near = "" if model.n_layers == 1 else f"{first:.0%} of the next layer's stream, "
            parts.append(f"{label}'s write is {near}{last:.0%} of the final stream")
    return f"in norm, {'; '.join(parts)}" if parts else "heads and MLPs write nothing"


def _lens_text(lens: dict[str, Any]) -> str:
    kl, accuracy = lens["kl"]["mean"], lens["accuracy"]["mean"]
    steps = [("at the input", 0), ("before the last layer", len(kl) - 2)][: len(kl) - 1]
    divergences = ", ".join(f"{kl[row]:.3g} {where}" for where, row in steps)
    shares = ", ".join(f"{accuracy[row]:.0%} {where}" for where, row in steps)
    return f"KL {divergences}, in nats; accuracy {shares}, {accuracy[-1]:.0%} at the end"


def counted(number: int, noun: str) -> str:
    """A number of things in words."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# --- panels ---------------------------------------------------------------------------------------


def add_panels(circuit: CircuitGraph, model: TracedModel, found: Measured) -> None:
    """Add the plots; the circuit has the logit lens already."""
    places = [float(layer) for layer in range(model.n_layers + 1)]
    end = f"{model.n_layers} is the end"
    growth = found.growth
    named = {"stream": "residual stream", **WRITES}
    Curves(
        title="Norms by layer",
        caption="The stream before each layer, and what the layer writes to it.",
        x=places,
        x_label=f"layer; {end}",
        y_label="L2 norm, geometric mean over tokens",
        curves=[
            _curve(named[name], growth[name], len(places))
            for name in named
            if any(growth[name].means)
        ],
        log_y=True,
    ).add_to(circuit)
    lens = circuit.graph["lens"]
    Curves(
        title="Logit lens",
        caption="What the stream before each layer would answer, against the model's answer.",
        x=places,
        x_label=f"layer; {end}",
        y_label="KL(answer ‖ lens), nats",
        curves=[Curve(name="KL", **lens["kl"])],
    ).add_to(circuit)
    weights = [key for key in WEIGHTS if key in growth]
    if model.n_layers > 1 and weights:
        Curves(
            title="Weights by layer",
            caption="W_OV, W_O and W_out write to the stream, W_Q and W_K read it.",
            x=places[:-1],
            x_label="layer",
            y_label="Frobenius norm, geometric mean over heads",
            curves=[_curve(WEIGHTS[key], growth[key], model.n_layers) for key in weights],
            log_y=True,
        ).add_to(circuit)
    _attenuation_panel(circuit, model, found.attenuation.size())


def _curve(name: str, growth: Growth, length: int) -> Curve:
    means = [*growth.means, *[None] * (length - len(growth.means))]
    if not any(growth.bounds):
        return Curve(name=name, mean=means)
    bounds = [*growth.bounds, *[None] * (length - len(growth.bounds))]
    low, high = ([None if b is None else b[end] for b in bounds] for end in (0, 1))
    return Curve(name=name, mean=means, lo=low, hi=high)


def _attenuation_panel(circuit: CircuitGraph, model: TracedModel, size: Tensor) -> None:
    sources = model.wiring.sources
    largest = size[:, 1:].nan_to_num().amax(1).tolist()
    rows = sorted(sorted(range(len(sources)), key=lambda row: -largest[row])[:SHOWN])
    values = [[v if v == v else None for v in size[row, 1:].tolist()] for row in rows]
    few = "" if len(rows) == len(sources) else f", the {SHOWN} largest"
    Heatmap(
        title=f"What is left of a write{few}",
        rows=[sources[row] for row in rows],
        columns=readers(model.n_layers)[1:],
        values=values,
        what="norm of the write / norm of the stream that is read, mean over tokens",
        row_label="written by",
        column_label="read by",
        diverging=False,
        notes=[["" if v is None else f"{v:.0%}" for v in row] for row in values],
    ).add_to(circuit)
