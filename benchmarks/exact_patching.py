"""Time of exact edge effects: CircuitLab, plain PyTorch, auto-circuit, and the floor of operations.

    python benchmarks/exact_patching.py --shape small
    python benchmarks/exact_patching.py --rounds 3 --json gpt2-small.json

All works run on one model and the same prompts, in interleaved rounds; ratios are taken within a
round. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from auto_circuit_patching import Peer
from edge_attribution import (
    SHAPES,
    SHORTEST,
    Prompts,
    random_model,
    random_prompts,
    timed,
    versions,
    wait_until_quiet,
)
from summary import Sample, markdown, ratios, spread

#: Edges in one batch of the plain version, by type of device: the fastest on the machines tried.
CHUNK = {"cpu": 12, "cuda": 576}
#: Largest difference between two works' effects, in logits.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Part:
    """A piece of a work: timed alone, counted ``weight`` times in the time of all edges."""

    weight: float
    work: Callable[[], object]
    calls: int = 1


@dataclass(frozen=True)
class Case:
    """What all works share."""

    model: Any
    task: Any
    module: Any
    prompts: Prompts
    options: argparse.Namespace

    @property
    def edges(self) -> tuple[Any, ...]:
        """All edges of the model."""
        edges: tuple[Any, ...] = self.model.wiring.edges
        return edges

    @property
    def peer_edges(self) -> list[Any]:
        """Edges evenly spread over all of them, which are in the order of their receivers."""
        return evenly(self.edges, self.options.peer_edges)


def evenly(values: Sequence[Any], n: int) -> list[Any]:
    """At most n of the values, evenly spread."""
    n = min(n, len(values))
    return [values[int((i + 0.5) * len(values) / n)] for i in range(n)]


def circuitlab_parts(case: Case) -> Iterator[Part]:
    """CircuitLab's ``edge_effects`` of all edges; or some of the batches that it would run.

    With ``--sample`` a block gives whole batches of the complete run, so that as many edges share a
    batch and as much work as there.
    """
    from circuitlab import edge_effects, patchers
    from circuitlab.memory import TOGETHER

    if not case.options.sample:
        yield Part(1, lambda: edge_effects(case.model, case.task, case.edges))
        return
    held = list(patchers(case.model, case.task))
    yield Part(1, lambda: list(patchers(case.model, case.task)))
    size = TOGETHER * held[0].at_once
    for block, rows in case.model.wiring.by_block(case.edges):
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        wanted = case.options.sample * 3 * case.model.n_heads if block.kind == "attention" else 1
        chosen = evenly(batches, math.ceil(wanted / size))
        edges = [[case.edges[row] for row in batch] for batch in chosen]
        weight = len(rows) / sum(map(len, edges))
        yield Part(weight, lambda edges=edges: [p.edges(e) for p in held for e in edges])


def plain_patcher(case: Case) -> Any:
    """The plain version, its two reference runs done."""
    from plain_patching import PlainPatcher

    p, chunk = case.prompts, case.options.chunk
    return PlainPatcher(case.module, p.clean, p.corrupt, p.right, p.wrong, chunk)


def plain_parts(case: Case) -> Iterator[Part]:
    """The plain version on all edges; or on some sources, each with all it reaches in a block."""
    import torch

    def all_edges() -> None:
        patcher = plain_patcher(case)
        for block in case.model.wiring.blocks():
            patcher.edges(block.kind, block.layer, torch.arange(block.n_sources))

    if not case.options.sample:
        yield Part(1, all_edges)
        return
    held = plain_patcher(case)
    yield Part(1, lambda: plain_patcher(case))
    for block in case.model.wiring.blocks():
        n = case.options.sample if block.kind == "attention" else case.options.chunk
        sources = torch.tensor(evenly(range(block.n_sources), n))
        work = partial(held.edges, block.kind, block.layer, sources)
        yield Part(block.n_sources / len(sources), work)


def plain_table(case: Case) -> dict[Any, Any]:
    """The plain version's effects ``[pairs]`` of the checked edges."""
    import torch

    from circuitlab import Edge

    patcher, wiring, found = plain_patcher(case), case.model.wiring, {}
    wanted = set(checked_edges(case))
    for block in wiring.blocks():
        receivers = wiring.receivers[block.receivers]
        for row, source in enumerate(wiring.sources[: block.n_sources]):
            columns = {n: Edge(source, *r) for n, r in enumerate(receivers)}
            asked = {n: edge for n, edge in columns.items() if edge in wanted}
            if not asked:
                continue
            effects = patcher.edges(block.kind, block.layer, torch.tensor([row]))[0]
            found |= {edge: effects[n] for n, edge in asked.items()}
    return found


def checked_edges(case: Case) -> tuple[Any, ...]:
    """Edges whose effects are compared: all, or those that auto-circuit patches."""
    return tuple(case.peer_edges) if case.options.sample else case.edges


def synchronized(work: Callable[[], object], device: str) -> Callable[[], object]:
    """The work, over when the device is done with it."""
    if device == "cpu":
        return work
    import torch

    def whole() -> None:
        work()
        torch.cuda.synchronize()

    return whole


def prepared(parts: Iterator[Part], device: str) -> list[Part]:
    """Each part called once, which warms up and says how many calls make a sample."""
    ready = []
    for part in parts:
        work = synchronized(part.work, device)
        calls = math.ceil(SHORTEST / timed(work).seconds)
        ready.append(Part(part.weight, work, calls))
    return ready


def measured(parts: list[Part], n_edges: int) -> Sample:
    """Time of one edge, mean over all edges of the model."""
    samples = [timed(part.work, part.calls) for part in parts]
    weights = [part.weight / n_edges for part in parts]
    # What neighbours did over the whole of the timing, not in its shortest part.
    lasted = [s.seconds * part.calls for s, part in zip(samples, parts, strict=True)]
    busy = sum((s.foreign_cores or 0.0) * t for s, t in zip(samples, lasted, strict=True))
    return Sample(
        sum(w * s.seconds for w, s in zip(weights, samples, strict=True)),
        sum(w * s.cpu_seconds for w, s in zip(weights, samples, strict=True)),
        None if samples[0].foreign_cores is None else busy / sum(lasted),
    )


def floor_operations(case: Case) -> float:
    """Multiply-adds of one edge, mean over all edges."""
    from plain_patching import multiply_adds

    shape, o = SHAPES[case.options.shape], case.options
    sizes = shape["n_layer"], shape["n_head"], shape["n_embd"], o.pairs, o.tokens
    total = sum(
        len(rows) * multiply_adds(*sizes, block.kind, block.layer)
        for block, rows in case.model.wiring.by_block(case.edges)
    )
    return total / len(case.edges)


def matrix_product(case: Case) -> tuple[Callable[[], object], float]:
    """The product of an MLP's first layer for one batch of edges, and its multiply-adds."""
    import torch

    rows = case.options.chunk * case.options.pairs * case.options.tokens
    width = SHAPES[case.options.shape]["n_embd"]
    generator = torch.Generator().manual_seed(2)
    left, right = (
        torch.randn(size, generator=generator).to(case.options.device)
        for size in ((rows, width), (width, 4 * width))
    )
    out = left.new_empty(rows, 4 * width)
    work = synchronized(lambda: torch.mm(left, right, out=out), case.options.device)
    return work, 4.0 * rows * width**2


def measure(case: Case, peer: Peer | None) -> list[dict[str, Sample]]:
    """Per round the time of one edge by each work; ``floor`` is what the operations need."""
    device = case.options.device
    works = {
        "plain": prepared(plain_parts(case), device),
        "circuitlab": prepared(circuitlab_parts(case), device),
    }
    product, operations = matrix_product(case)
    per_edge, calls = floor_operations(case), math.ceil(SHORTEST / timed(product).seconds)
    for work in ("edge", "acdc") if peer else ():
        peer.ask(work)
    rounds = []
    for index in range(case.options.rounds):
        wait_until_quiet(case.options.wait)
        asked: dict[str, Callable[[], Sample]] = {
            name: lambda parts=parts: measured(parts, len(case.edges))
            for name, parts in works.items()
        }
        if peer:
            asked["auto-circuit edge"] = lambda: peer.ask("edge")
            asked["auto-circuit ACDC step"] = lambda: peer.ask("acdc")
        # Every second round runs backwards, so that no work always follows the same neighbour.
        order = list(asked) if index % 2 == 0 else list(reversed(asked))
        products, found = [timed(product, calls)], {}
        for name in order:
            found[name] = asked[name]()
            products.append(timed(product, calls))
        # The fastest product: the floor is what the machine can do, not what a neighbour left.
        fastest = min(products, key=lambda sample: sample.seconds)
        share = per_edge / operations
        found["floor"] = Sample(
            fastest.seconds * share, fastest.cpu_seconds * share, fastest.foreign_cores
        )
        rounds.append(found)
    return rounds


def differences(case: Case, peer: Peer | None) -> dict[str, float]:
    """Largest difference from CircuitLab's effects, logits, of each other work."""
    import torch

    from circuitlab import edge_effects

    edges = checked_edges(case)
    ours = dict(zip(edges, edge_effects(case.model, case.task, edges), strict=True))
    plain = plain_table(case)
    found = {"plain": max(float((plain[e].cpu() - ours[e]).abs().max()) for e in edges)}
    if peer:
        theirs = zip(peer.edges, map(torch.tensor, peer.effects), strict=True)
        found["auto-circuit"] = max(float((t - ours[e]).abs().max()) for e, t in theirs)
    return found


def summarize(rounds: list[dict[str, Sample]], n_edges: int) -> dict[str, Any]:
    """Per work: seconds of an edge and of all edges, ratios to the others, foreign cores."""
    summary: dict[str, Any] = {}
    for name in ("floor", "plain", "circuitlab", *sorted(n for n in rounds[0] if "auto" in n)):
        seconds = spread([r[name].seconds for r in rounds])
        row: dict[str, Any] = {"ms an edge": {k: 1e3 * v for k, v in seconds.items()}}
        row["all edges, s"] = seconds["median"] * n_edges
        for base in ("circuitlab", "plain", "floor"):
            row[f"x {base}"] = ratios(rounds, name, base)
        foreign = [f for r in rounds if (f := r[name].foreign_cores) is not None]
        row["foreign_cores"] = max(foreign) if foreign else None
        summary[name] = row
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""

    def range_(values: dict[str, float]) -> str:
        return f"{values['median']:.3g} ({values['min']:.3g} - {values['max']:.3g})"

    heads = ["ms an edge", "x circuitlab", "x plain", "x floor"]
    rows = [["work", *heads, "all edges, s", "foreign cores"]]
    for name, row in summary.items():
        foreign = row["foreign_cores"]
        rows.append([name, *(range_(row[head]) for head in heads), f"{row['all edges, s']:.3g}"])
        rows[-1].append("" if foreign is None else f"{foreign:.1f}")
    return markdown(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--sample",
        type=int,
        metavar="SOURCES",
        help="time this many sources' edges into each layer's heads, not all edges; 0 for all; "
        "1 where the shape is gpt2-small and the device cpu",
    )
    parser.add_argument("--chunk", type=int, help="edges in one batch of the plain version")
    parser.add_argument("--auto-circuit", metavar="PYTHON", help="of auto-circuit's environment")
    parser.add_argument("--peer-edges", type=int, default=8, help="edges auto-circuit patches")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--wait", type=float, default=60.0, help="longest wait for a quiet machine, seconds a round"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    if options.sample is None:
        options.sample = int(options.shape == "gpt2-small" and options.device == "cpu")
    options.chunk = CHUNK[options.device] if options.chunk is None else options.chunk
    for name in ("chunk", "peer_edges", "pairs", "tokens", "threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; give 1 or more")
    if options.auto_circuit and options.device != "cpu":
        parser.error("--auto-circuit is measured on the CPU only; leave out --device")
    return options


def make_case(options: argparse.Namespace) -> Case:
    """The model and prompts on the device, for CircuitLab and plain."""
    import torch

    import circuitlab

    torch.set_num_threads(options.threads)
    module = random_model(options.shape, options.tokens).to(options.device)
    prompts = random_prompts(options.shape, options.pairs, options.tokens)
    model = circuitlab.load_model((module, None))
    columns = (prompts.clean, prompts.corrupt, prompts.right[:, None], prompts.wrong[:, None])
    pairs = tuple(
        circuitlab.PromptPair(*map(tuple, pair))
        for pair in zip(*(column.tolist() for column in columns), strict=True)
    )
    task = model.encode(circuitlab.Task(name="random-tokens", pairs=pairs))
    moved = Prompts(*(value.to(options.device) for value in vars(prompts).values()))
    return Case(model, task, module, moved, options)


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; 1 if the works' effects differ."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    options = parse(arguments)
    case = make_case(options)
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if options.auto_circuit:
            prompts, edges, threads = case.prompts, case.peer_edges, options.threads
            peer = Peer(options.auto_circuit, Path(folder), case.module, prompts, edges, threads)
        rounds = measure(case, peer)
        apart = differences(case, peer)
        if peer:
            peer.close()
    summary = summarize(rounds, len(case.edges))
    rate = 2e3 * floor_operations(case) / summary["floor"]["ms an edge"]["median"]
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    document = {
        "settings": settings | SHAPES[options.shape],
        "versions": versions() | (peer.versions if peer else {}),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "edges": len(case.edges),
        "multiply-adds an edge": floor_operations(case),
        "matrix product, operations a second": rate,
        "largest difference": apart,
        "summary": summary,
        "rounds": [{name: asdict(sample) for name, sample in r.items()} for r in rounds],
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(table(summary))
    print(f"\nmatrix product: {rate / 1e9:.0f} billion operations a second")
    for name, value in apart.items():
        print(f"{name}: effects differ from CircuitLab's by {value:.1e} at most")
    return int(max(apart.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
