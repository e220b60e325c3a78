"""Time and peak memory of edge attribution, next to the plain PyTorch work it cannot do without.

    python benchmarks/edge_attribution.py --rounds 5 --json edge_attribution.json

All works run in one process on one model and the same prompts, in interleaved rounds; ratios are
taken within a round. Peak memory is that of a fresh process per work. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from summary import Sample, add_peers, summarize, table

SHAPES = {
    "gpt2-small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50_257},
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1_000},
}
PLAIN = ("forward", "backward")
CIRCUITLAB = ("eap", "eap-ig")
MEMORY_ONLY = "model"
#: Seconds a sample lasts at least: /proc/stat counts in hundredths.
SHORTEST = 0.25
#: Cores other processes may use on a machine called quiet.
QUIET = 0.15


@dataclass(frozen=True)
class Prompts:
    """Random token prompts: ``clean`` and ``corrupt`` ``[pairs, tokens]``, answers ``[pairs]``."""

    clean: Any
    corrupt: Any
    right: Any
    wrong: Any


def random_model(shape: str, tokens: int) -> Any:
    """A randomly initialized ``GPT2LMHeadModel`` in evaluation mode, parameters frozen."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {**SHAPES[shape], "bos_token_id": 0, "eos_token_id": 0}
    module: Any = GPT2LMHeadModel(GPT2Config(**settings, n_positions=max(1024, tokens)))
    return module.eval().requires_grad_(False)


def random_prompts(shape: str, pairs: int, tokens: int) -> Prompts:
    """Prompt pairs that differ at every position, with one right and one wrong answer each."""
    import torch

    generator = torch.Generator().manual_seed(1)
    vocab = SHAPES[shape]["vocab_size"]
    ids = torch.randint(1, vocab, (2, pairs, tokens), generator=generator)
    right = torch.randint(1, vocab, (pairs,), generator=generator)
    wrong = (right + torch.randint(1, vocab, (pairs,), generator=generator)) % vocab
    return Prompts(ids[0], ids[1], right, wrong)


def plain_forward(module: Any, prompts: Prompts) -> Callable[[], object]:
    """One forward pass of the corrupt prompts, all logits, nothing kept for a backward pass."""
    import torch

    def work() -> object:
        with torch.inference_mode():
            return module(prompts.corrupt, use_cache=False).logits

    return work


def plain_backward(module: Any, prompts: Prompts) -> Callable[[], object]:
    """One forward pass of the clean prompts, all logits, and a backward pass to the embeddings."""

    def work() -> object:
        embeddings = module.transformer.wte(prompts.clean).detach().requires_grad_()
        last = module(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        right = last.gather(1, prompts.right[:, None])
        (right - last.gather(1, prompts.wrong[:, None])).mean().backward()
        return embeddings.grad

    return work


def circuitlab_scores(
    module: Any, prompts: Prompts, method: str, steps: int
) -> Callable[[], object]:
    """CircuitLab's scores of all edges; the only function here that knows CircuitLab's face.

    Loading the model and writing the task are preparation and not timed.
    """
    from circuitlab_edge_attribution.attribution import edge_scores

    import circuitlab

    model = circuitlab.load_model((module, None))
    pairs = tuple(
        circuitlab.PromptPair(tuple(clean), tuple(corrupt), (right,), (wrong,))
        for clean, corrupt, right, wrong in zip(
            prompts.clean.tolist(),
            prompts.corrupt.tolist(),
            prompts.right.tolist(),
            prompts.wrong.tolist(),
            strict=True,
        )
    )
    task = circuitlab.Task(name="random-tokens", pairs=pairs)
    encoded = model.encode(task)
    return lambda: edge_scores(model, encoded, method=method, ig_steps=steps)


def prepare(name: str, options: argparse.Namespace, module: Any, prompts: Prompts) -> Any:
    """The callable to time for one work."""
    if name == "forward":
        return plain_forward(module, prompts)
    if name == "backward":
        return plain_backward(module, prompts)
    if name == MEMORY_ONLY:
        return lambda: None
    return circuitlab_scores(module, prompts, name, options.steps)


def _machine_busy_seconds() -> float | None:
    """Processor seconds all processes have used since boot."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    return (sum(fields) - fields[3] - fields[4]) / float(os.sysconf("SC_CLK_TCK"))


def timed(work: Callable[[], object], calls: int = 1) -> Sample:
    """The mean of ``calls`` calls of ``work``, the garbage of earlier works cleared before."""
    gc.collect()
    busy, cpu, start = _machine_busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(calls):
        work()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu
    after = _machine_busy_seconds()
    foreign = None
    if busy is not None and after is not None:
        foreign = max(0.0, after - busy - cpu_seconds) / seconds
    return Sample(seconds / calls, cpu_seconds / calls, foreign)


def wait_until_quiet(longest: float) -> None:
    """Return when other processes have left the processors for half a second, or time is up."""
    end = time.monotonic() + longest
    while time.monotonic() < end:
        foreign = timed(lambda: time.sleep(0.5)).foreign_cores
        if foreign is None or foreign < QUIET:
            return


def measure_times(options: argparse.Namespace) -> tuple[list[dict[str, Sample]], dict[str, str]]:
    """Samples per round and work, and why a work could not be prepared."""
    import torch

    torch.set_num_threads(options.threads)
    module = random_model(options.shape, options.tokens)
    prompts = random_prompts(options.shape, options.pairs, options.tokens)
    works: dict[str, Callable[[], object]] = {}
    unavailable: dict[str, str] = {}
    for name in options.works:
        try:
            works[name] = prepare(name, options, module, prompts)
        except ImportError as error:
            unavailable[name] = f"{type(error).__name__}: {error}"
    # The first call warms up, the second says how many calls make a sample.
    calls = {
        name: math.ceil(SHORTEST / [timed(work), timed(work)][1].seconds)
        for name, work in works.items()
    }
    rounds = []
    for index in range(options.rounds):
        # Every second round runs backwards, so that no work always follows the same neighbour.
        order = list(works) if index % 2 == 0 else list(reversed(works))
        wait_until_quiet(options.wait)
        rounds.append({name: timed(works[name], calls[name]) for name in order})
    return rounds, unavailable


def reset_peak() -> None:
    """Forget the peak so far, where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Largest resident set of this process since the last reset, MiB.

    On Linux a child's ``ru_maxrss`` begins at its parent's, so it is read only without /proc.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure_memory_here(name: str, options: argparse.Namespace) -> float:
    """Peak MiB of this process, model included, while it prepares and does one work."""
    import torch

    torch.set_num_threads(options.threads)
    module = random_model(options.shape, options.tokens)
    prompts = random_prompts(options.shape, options.pairs, options.tokens)
    gc.collect()
    # Initialization needs more than the model itself and would hide the work's own peak.
    reset_peak()
    prepare(name, options, module, prompts)()
    return peak_mib()


def last_json_line(command: list[str]) -> dict[str, Any]:
    """What a command prints as JSON on its last line of standard output.

    Raises:
        RuntimeError: the command failed, or its last line is not a JSON object.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        said = (done.stderr or done.stdout).strip()[-800:]
        raise RuntimeError(f"{shlex.join(command)} exited with {done.returncode}: {said}")
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def measure_memory(options: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Peak MiB of each work, every one in its own process."""
    again = [sys.executable, __file__, *options.arguments]
    return {
        name: float(last_json_line([*again, "--memory-of", name])["peak_mib"])
        for name in (MEMORY_ONLY, *names)
    }


def measure_peers(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One JSON object per peer: ``seconds`` (a list) and ``peak_mib``, as the peer reports them."""
    sizes = {"shape": options.shape, "pairs": options.pairs, "tokens": options.tokens}
    sizes |= {"steps": options.steps, "threads": options.threads, "rounds": options.rounds}
    flags = [text for key, value in sizes.items() for text in (f"--{key}", str(value))]
    peers = {}
    for entry in options.peer:
        name, _, command = entry.partition("=")
        peers[name] = last_json_line([*shlex.split(command), *flags])
    return peers


def versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    found = {"python": platform.python_version()}
    for package in ("circuitlab", "torch", "transformers", "nnsight"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--works", nargs="*", choices=CIRCUITLAB, default=list(CIRCUITLAB))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="steps of EAP-IG")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--wait", type=float, default=60.0, help="longest wait for a quiet machine, seconds a round"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--memory-of", choices=(MEMORY_ONLY, *PLAIN, *CIRCUITLAB))
    options = parser.parse_args(arguments)
    for name in ("pairs", "tokens", "steps", "threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    for entry in options.peer:
        if "=" not in entry:
            parser.error(f"--peer {entry!r} has no command; write NAME=COMMAND")
    options.arguments, options.works = arguments, [*PLAIN, *options.works]
    return options


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; 1 if a work that was asked for could not run."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = parse(arguments)
    if options.memory_of:
        print(json.dumps({"peak_mib": measure_memory_here(options.memory_of, options)}))
        return 0
    rounds, unavailable = measure_times(options)
    measured = [name for name in options.works if name not in unavailable]
    memory = {} if options.no_memory else measure_memory(options, measured)
    peers = measure_peers(options)
    summary = summarize(rounds, memory)
    add_peers(summary, peers)
    sizes = ("shape", "pairs", "tokens", "steps", "threads")
    document = {
        "settings": {name: getattr(options, name) for name in sizes} | SHAPES[options.shape],
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "summary": summary,
        "rounds": [{name: asdict(sample) for name, sample in r.items()} for r in rounds],
        "peers": peers,
        "unavailable": unavailable,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(table(summary))
    for name, reason in unavailable.items():
        print(f"{name} was not measured: {reason}", file=sys.stderr)
    return 1 if unavailable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
