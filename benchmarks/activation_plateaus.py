"""Time of thousands of interpolation steps, next to the same forwards in plain PyTorch.

    python benchmarks/activation_plateaus.py --rounds 3 --json plateaus.json
    python benchmarks/activation_plateaus.py --shape small --threads 1

Both run on one model and the same points, in interleaved rounds; ratios are taken within a round.
See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_attribution import SHAPES, random_model, timed, versions, wait_until_quiet
from summary import Sample, markdown, ratios, spread

PLAIN, WALK = "plain", "walk"
#: Largest ratio of the medians that is called fast enough.
GOAL = 1.15
#: Largest difference between the logits of both, of a size of some units.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Walked:
    """What both are given: ids ``[rows, tokens]`` and points ``[rows, steps, d_model]``."""

    ids: Any
    points: Any
    layer: int


def random_walks(module: Any, options: argparse.Namespace) -> Walked:
    """Random prompts, and straight lines between their streams at one layer's input."""
    import torch

    generator = torch.Generator().manual_seed(1)
    vocab = SHAPES[options.shape]["vocab_size"]
    ids = torch.randint(1, vocab, (options.rows, options.tokens), generator=generator)
    stream = clean_stream(module, ids.to(options.device), options.layer)[:, -1]
    t = torch.linspace(0, 1, options.steps, device=stream.device)[:, None]
    points = (1 - t) * stream[:, None] + t * stream.roll(1, 0)[:, None]
    return Walked(ids.to(options.device), points, options.layer)


def clean_stream(module: Any, ids: Any, layer: int) -> Any:
    """The residual stream that a block reads, ``[rows, tokens, d_model]``."""
    import torch

    with torch.inference_mode():
        body = module.transformer
        stream = body.wte(ids) + body.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in body.h[:layer]:
            stream = block(stream)
        return stream


def plain_walk(module: Any, walked: Walked, batch: int) -> Callable[[], Any]:
    """The blocks from the layer on, called one after another, and the last position unembedded.

    The clean stream is there before, as are the points; logits of all steps are kept.
    """
    import torch

    body, points = module.transformer, walked.points.flatten(0, 1)
    stream = clean_stream(module, walked.ids, walked.layer)
    rows = torch.arange(len(points), device=points.device) // walked.points.shape[1]

    def work() -> Any:
        logits = points.new_empty(len(points), module.config.vocab_size)
        with torch.inference_mode():
            for first in range(0, len(points), batch):
                chosen = slice(first, first + batch)
                hidden = stream[rows[chosen]]
                hidden[:, -1] = points[chosen]
                for block in body.h[walked.layer :]:
                    hidden = block(hidden)
                logits[chosen] = module.lm_head(body.ln_f(hidden[:, -1]))
            synchronized(points)
        return logits.view(*walked.points.shape[:2], -1)

    return work


def circuitlab_walk(module: Any, walked: Walked, batch: int | None) -> Callable[[], Any]:
    """CircuitLab's walk with all logits; the only function here that knows CircuitLab's face.

    Loading the model is preparation and not timed; reading the clean stream is.
    """
    import torch
    from circuitlab_activation_plateaus.walks.walking import walk

    import circuitlab

    model = circuitlab.load_model((module, None))
    tokens = circuitlab.Tokens(walked.ids, torch.ones_like(walked.ids, dtype=torch.bool))
    site = circuitlab.Site("resid_pre", walked.layer)

    def work() -> Any:
        logits = walk(model, tokens, site, walked.points, batch_size=batch).logits
        synchronized(logits)
        return logits

    return work


def synchronized(tensor: Any) -> None:
    """Return when the device has done its work."""
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize()


def largest_gap(logits: dict[str, Any]) -> float:
    """Between both works' logits, each step's mean over the vocabulary taken off."""
    gaps = [
        (plain - plain.mean(-1, keepdim=True) - walked).abs().max()
        for plain, walked in zip(logits[PLAIN], logits[WALK], strict=True)
    ]
    return float(max(gaps))


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Sample]], float]:
    """Samples per round and work, and the largest gap between their logits."""
    import torch

    torch.set_num_threads(options.threads)
    module = random_model(options.shape, options.tokens).to(options.device)
    walked = random_walks(module, options)
    works = {
        PLAIN: plain_walk(module, walked, options.plain_batch),
        WALK: circuitlab_walk(module, walked, options.batch),
    }
    gap = largest_gap({name: work() for name, work in works.items()})
    rounds = []
    for index in range(options.rounds):
        order = list(works) if index % 2 == 0 else list(reversed(works))
        sampled = {}
        for name in order:
            wait_until_quiet(options.wait)
            sampled[name] = timed(works[name])
        rounds.append(sampled)
    return rounds, gap


def summarized(rounds: list[dict[str, Sample]], n_steps: int) -> dict[str, Any]:
    """Per work: seconds, microseconds a step, ratios to the plain work of the same round."""
    summary: dict[str, Any] = {}
    for name in (PLAIN, WALK):
        foreign = [f for r in rounds if (f := r[name].foreign_cores) is not None]
        cpu = spread([r[name].cpu_seconds / r[PLAIN].cpu_seconds for r in rounds])
        summary[name] = {
            "seconds": spread([r[name].seconds for r in rounds]),
            "microseconds a step": spread([1e6 * r[name].seconds / n_steps for r in rounds]),
            "x plain": ratios(rounds, name, PLAIN),
            "x plain, processor": cpu,
            "foreign_cores": max(foreign) if foreign else None,
        }
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    heads = ["work", "median s", "µs a step", "x plain (min - max)", "x plain, processor"]
    rows = [[*heads, "foreign cores"]]
    for name, row in summary.items():
        ratio, foreign = row["x plain"], row["foreign_cores"]
        rows.append(
            [
                name,
                f"{row['seconds']['median']:.2f}",
                f"{row['microseconds a step']['median']:.0f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})",
                f"{row['x plain, processor']['median']:.2f}",
                "" if foreign is None else f"{foreign:.1f}",
            ]
        )
    return markdown(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--rows", type=int, default=200, help="prompts")
    parser.add_argument("--steps", type=int, default=50, help="steps of each prompt's walk")
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--layer", type=int, default=1, help="the block that reads the points")
    parser.add_argument("--batch", type=int, help="steps a pass of the walk; CircuitLab's choice")
    parser.add_argument("--plain-batch", type=int, default=100, help="steps a plain pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--wait", type=float, default=60.0, help="longest wait for a quiet machine, seconds a work"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    for name in ("rows", "steps", "tokens", "plain_batch", "threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= options.layer < SHAPES[options.shape]["n_layer"]:
        parser.error(f"--layer {options.layer} does not exist in {options.shape}")
    return options


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; 1 if both do not agree or the goal is missed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = parse(arguments)
    rounds, gap = measure(options)
    summary = summarized(rounds, options.rows * options.steps)
    sizes = ("shape", "rows", "steps", "tokens", "layer", "batch", "plain_batch", "threads")
    document = {
        "settings": {name: getattr(options, name) for name in (*sizes, "device")},
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "summary": summary,
        "rounds": [{name: asdict(sample) for name, sample in r.items()} for r in rounds],
        "largest gap": gap,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(table(summary))
    if gap > TOLERANCE:
        print(f"logits differ by {gap:.2g}, more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    slow = summary[WALK]["x plain"]["median"] > GOAL
    if slow:
        print(f"the walk takes more than {GOAL} times the plain forwards", file=sys.stderr)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
