"""Print the tables of concepts.md and models.md that come from running models made here.

Run by hand after a change of a model; the tests compare what it gives with the pages.
"""

from __future__ import annotations

import math

import torch

import circuitlab
from circuitlab import zoo
from circuitlab.zoo.circle import Circle
from circuitlab.zoo.compiling import least_attention

#: The edge that carries one bit; the induction head's key for the model without bits.
ONE_BIT = ("a0.h0", "m0", "")
KEY = ("a0.h0", "a1.h0", "k")


def main() -> None:
    """Print every table."""
    torch.set_num_threads(1)
    tables = (
        ("concepts.md", gap_rows()),
        ("models.md, trained models", model_rows()),
        ("models.md, precision", precision_rows()),
        ("models.md, ANDs", and_rows()),
    )
    for title, rows in tables:
        print(f"\n{title}\n\n" + "\n".join(rows))


def gap_rows() -> list[str]:
    """What EAP and EAP-IG explain of each hand-made model, one table row for each."""
    rows = []
    for name in ("gate-add", "gate-and", "gate-or", "gate-xor", "gate-jump", "hand-induction"):
        model = circuitlab.load_model(name)
        eap = circuitlab.build_circuit(model, top="all", method="eap", verify=0)
        path = circuitlab.build_circuit(model, top="all")
        edge = circuitlab.Edge(*(KEY if name == "hand-induction" else ONE_BIT))
        task = next(task for task in zoo.tasks() if task.name == name)
        exact = float(circuitlab.edge_effects(model, model.encode(task), [edge]).mean())
        whole = path.graph["completeness"]
        cells = [
            signed(whole["effect"]),
            signed(eap.graph["completeness"]["explained"]),
            signed(whole["explained"]),
            signed(whole["gap"]),
            signed(path.edges[tuple(edge)]["score"]),
            signed(exact),
        ]
        rows.append(f"| `{name}` | {' | '.join(cells)} | {path.graph['verdict']} |")
    return rows


def model_rows() -> list[str]:
    """Size and held-out quality of each trained model, one table row for each."""
    rows = []
    for name, bundled in zoo.MODELS.items():
        if bundled.kind != "trained":
            continue
        module, tokenizer = zoo.load(name)
        found = zoo.evaluate(name, module, tokenizer)
        n_parameters = sum(parameter.numel() for parameter in module.parameters())
        cells = [
            f"{n_parameters:,}",
            f"{len(tokenizer)}",
            f"{found['accuracy']:.3f}",
            f"{found['probability-difference']:.2f}",
            f"{found['clean-logit-difference']:+.1f}",
            f"{found['corrupt-logit-difference']:+.1f}",
        ]
        rows.append(f"| `{name}` | {bundled.shape} | {' | '.join(cells)} |")
    return rows


def precision_rows() -> list[str]:
    """The least attention of circles of words in two types, rounded down, one row for each size."""
    rows = []
    for n_words in (64, 4096, 50_257):
        circle = Circle(n_words)
        shares = [
            share
            for dtype in (torch.float32, torch.float64)
            for share in least_attention(circle, dtype, sample=4096)
        ]
        cells = [f"{math.floor(100 * share) / 100:.2f}" for share in shares]
        sizes = f"{n_words:,} | {circle.gap:.1e} | {circle.sharpness:.1e}"
        rows.append(f"| {sizes} | {' | '.join(cells)} |")
    return rows


def and_rows() -> list[str]:
    """How the models of ANDs compare with the best linear function, one table row for each."""
    names = ("interaction", "error", "linear-error", "recall", "linear-recall", "precision")
    rows = []
    for name in ("hand-and", "and-superposition"):
        found = zoo.evaluate(name, *zoo.load(name))
        rows.append(f"| `{name}` | {' | '.join(f'{found[key]:.2f}' for key in names)} |")
    return rows


def signed(value: float) -> str:
    """Two decimals with a sign; no minus zero."""
    return f"{value if abs(value) >= 0.005 else 0.0:+.2f}".replace("-", "−").replace("+0.00", "0")


if __name__ == "__main__":
    main()
