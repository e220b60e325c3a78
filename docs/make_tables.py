"""Print the tables of concepts.md and models.md that come from running the bundled models.

Run by hand after a change of a model; the tests compare what it gives with the pages.
"""

from __future__ import annotations

import torch

import circuitlab
from circuitlab import zoo

#: The edge that carries one bit; the induction head's key for the model without bits.
ONE_BIT = ("a0.h0", "m0", "")
KEY = ("a0.h0", "a1.h0", "k")


def main() -> None:
    """Print every table."""
    torch.set_num_threads(1)
    for title, rows in (("concepts.md", gap_rows()), ("models.md", model_rows())):
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


def signed(value: float) -> str:
    """Two decimals with a sign; no minus zero."""
    return f"{value if abs(value) >= 0.005 else 0.0:+.2f}".replace("-", "−").replace("+0.00", "0")


if __name__ == "__main__":
    main()
