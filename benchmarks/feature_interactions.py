"""Time of a training step of two dictionaries, without and with a penalty on their interactions.

    python benchmarks/feature_interactions.py --json interactions.json --plot interactions.plot.svg

Steps are timed in interleaved rounds; ratios are taken within a round. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from summary import Sample, markdown, ratios, spread

#: What is timed: across what, target tokens and rows of the penalty; None for all.
WORKS: dict[str, tuple[str, int | None, int | None]] = {
    "mlp, all tokens": ("mlp", None, None),
    "mlp, 256 tokens": ("mlp", 256, None),
    "mlp, 64 tokens": ("mlp", 64, None),
    "mlp, 256 tokens, 4 rows": ("mlp", 256, 4),
    "block, 64 tokens, 4 rows": ("block", 64, 4),
    "block, 64 tokens": ("block", 64, None),
    "block, 16 tokens, 4 rows": ("block", 16, 4),
}


class Bench:
    """Two dictionaries of a random GPT-2-shaped layer, and random activations.

    Activations are Gaussian, so that active latents are spread over the whole dictionary: as many
    different rows as possible have to be gathered.
    """

    def __init__(self, d: int, k: int, options: argparse.Namespace) -> None:
        import torch
        from circuitlab_feature_interactions.interactions import make_route
        from circuitlab_feature_interactions.sites import make_pair
        from transformers import GPT2Config, GPT2LMHeadModel

        import circuitlab

        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=1,
            n_head=d // 64,
            n_embd=d,
            vocab_size=100,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
        model = circuitlab.load_model((GPT2LMHeadModel(config).eval(), None))
        self.routes = {
            name: make_route(model, make_pair(name, 0, model)) for name in ("mlp", "block")
        }
        prompts = options.tokens // options.context
        self.x = torch.randn(prompts, options.context, d)
        # Of no importance to the time, but the target has to be something.
        self.y = self.x.flip(0)
        n = options.expansion * d
        self.dictionaries = []
        for _ in range(2):
            rows = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
            zeros = torch.zeros(n)
            self.dictionaries.append(
                circuitlab.Dictionary(
                    rows.T.contiguous(),
                    zeros,
                    rows,
                    torch.zeros(d),
                    apply_b_dec_to_input=False,
                    k=k,
                )
            )
        self.scale = torch.ones(n)
        self.parameters = [p for d in self.dictionaries for p in d.parameters()]

    def step(self, work: str | None) -> None:
        """Forward and backward pass of both reconstructions, and of the penalty if one is named."""
        from circuitlab_feature_interactions.penalties import penalty

        source, target = self.dictionaries
        loss = sum(
            (dictionary(x.flatten(0, 1)) - x.flatten(0, 1)).square().mean()
            for dictionary, x in zip(self.dictionaries, (self.x, self.y), strict=True)
        )
        if work is not None:
            route, tokens, rows = WORKS[work]
            found = self.routes[route].attributions(
                source, target, self.x, tokens=tokens, rows=rows
            )
            loss = loss + penalty("l1")(found, self.scale)
        loss.backward()
        for parameter in self.parameters:
            parameter.grad = None


def timed(work: Callable[[], object]) -> Sample:
    """One timing of a step."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return Sample(time.perf_counter() - start, time.process_time() - cpu, None)


def measure(bench: Bench, works: list[str], n_rounds: int) -> dict[str, Any]:
    """Seconds of each work, and ratios to the step without a penalty."""
    names: list[str | None] = [None, *works]
    for name in names:
        bench.step(name)
    rounds = []
    for index in range(n_rounds):
        order = names if index % 2 == 0 else names[::-1]
        rounds.append({name or "none": timed(lambda n=name: bench.step(n)) for name in order})
    return {
        name: {
            "seconds": spread([r[name].seconds for r in rounds]),
            "x none": ratios(rounds, name, "none"),
            "cpu x none": spread([r[name].cpu_seconds / r["none"].cpu_seconds for r in rounds]),
        }
        for name in ("none", *works)
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    rows = [["penalty", "s a step", "x without (min - max)", "processor time x without"]]
    for name, row in summary.items():
        ratio, cpu = row["x none"], row["cpu x none"]
        text = f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})"
        rows.append([name, f"{row['seconds']['median']:.3g}", text, f"{cpu['median']:.2f}"])
    return markdown(rows)


def draw(growth: dict[str, dict[str, Any]], path: Path) -> None:
    """The cost of a step with penalties against width and active latents."""
    import circuitlab

    circuit = circuitlab.CircuitGraph()
    for name in ("d_model", "k"):
        points = [(float(x.split()[1]), s) for x, s in growth.items() if x.startswith(name)]
        works = [work for work in points[0][1] if work != "none"]
        circuitlab.Curves(
            title=f"Cost by {name}",
            x=[x for x, _ in points],
            x_label=name,
            y_label="step with penalty / step without",
            curves=[
                circuitlab.Curve(
                    name=work,
                    mean=[s[work]["x none"]["median"] for _, s in points],
                    lo=[s[work]["x none"]["min"] for _, s in points],
                    hi=[s[work]["x none"]["max"] for _, s in points],
                )
                for work in works
            ],
            log_x=True,
        ).add_to(circuit)
    circuitlab.write_circuit(circuit, path)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--works", default=",".join(map(str, range(len(WORKS)))), help="by number")
    parser.add_argument("--grow", action="store_true", help="measure by d_model and k too")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--plot", type=Path, help="draw the growth: FILE.plot.svg")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure, print the tables, write the files."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    options = parse(arguments)
    import torch

    torch.set_num_threads(options.threads)
    works = [list(WORKS)[int(number)] for number in options.works.split(",")]
    summary = measure(Bench(options.d_model, options.k, options), works, options.rounds)
    print(table(summary))
    growth = {}
    if options.grow or options.plot:
        sizes = [("d_model", options.d_model // part) for part in (4, 2, 1)]
        sizes += [("k", k) for k in (8, 16, 32, 64)]
        for name, size in sizes:
            shape = {"d_model": options.d_model, "k": options.k} | {name: size}
            bench = Bench(shape["d_model"], shape["k"], options)
            growth[f"{name} {size}"] = measure(bench, works, options.rounds)
            print(f"\n{name} {size}\n\n{table(growth[f'{name} {size}'])}", flush=True)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    if options.json:
        document = {
            "settings": settings,
            "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
            "summary": summary,
            "growth": growth,
        }
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    if options.plot:
        draw(growth, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
