"""Time of composition and copying scores from weights: CircuitLab and TransformerLens.

    python benchmarks/attention_heads.py --transformer-lens tl-venv/bin/python --json heads.json

All works see the same weights, in interleaved rounds; ratios are taken within a round. See
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_attribution import SHAPES, random_model, timed, versions, wait_until_quiet
from summary import Sample, markdown, ratios, spread

PORTS = ("q", "k", "v")
LENS = "transformer-lens composition"
#: Largest difference between raw composition scores, which lie between 0 and 1.
TOLERANCE = 1e-4
PACKAGES = ("transformer-lens", "transformers", "torch")


def uneven_model(shape: str) -> Any:
    """A random GPT-2 whose norms have gains and shifts, so that folding them matters."""
    import torch

    module = random_model(shape, 1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if ".ln_" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


# --- the peer, in an environment of its own -------------------------------------------------------


def lens_model(folder: Path) -> Any:
    """The GPT-2 of a folder as a ``HookedTransformer``, norms folded, written weights centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    module = GPT2LMHeadModel.from_pretrained(folder).eval()
    config = module.config
    lens = HookedTransformer(
        HookedTransformerConfig(
            n_layers=config.n_layer,
            n_heads=config.n_head,
            d_model=config.n_embd,
            d_head=config.n_embd // config.n_head,
            n_ctx=config.n_positions,
            d_vocab=config.vocab_size,
            act_fn="gelu_new",
            normalization_type="LN",
            eps=config.layer_norm_epsilon,
            device="cpu",
            original_architecture="GPT2LMHeadModel",
        )
    )
    lens.load_and_process_state_dict(
        convert_gpt2_weights(module, lens.cfg),
        fold_ln=True,
        center_writing_weights=True,
        center_unembed=True,
        fold_value_biases=True,
    )
    return lens.eval().requires_grad_(False)


def serve(folder: Path, threads: int) -> int:
    """Time all composition scores once for each line of standard input; write them to the folder.

    An answer is a line of standard output: the fields of a ``Sample``.
    """
    warnings.filterwarnings("ignore")
    # Libraries that print must not print into the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch

    torch.set_num_threads(threads)
    lens = lens_model(folder)
    found = {package: version(package) for package in PACKAGES}
    print(json.dumps({f"peer {name}": v for name, v in found.items()}), file=answers, flush=True)
    scores: dict[str, Any] = {}

    def work() -> None:
        for port in PORTS:
            scores[port] = lens.all_composition_scores(port.upper())

    for _ in sys.stdin:
        with torch.inference_mode():
            sample = timed(work)
        torch.save({port: table.clone() for port, table in scores.items()}, folder / "scores.pt")
        print(json.dumps(asdict(sample)), file=answers, flush=True)
    return 0


class Peer:
    """TransformerLens in a process of its own environment, idle unless it is asked."""

    def __init__(self, python: str, folder: Path, module: Any, threads: int) -> None:
        module.save_pretrained(folder)
        self._folder = folder
        command = [python, __file__, "--serve", str(folder), "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions: dict[str, str] = self._read()

    def ask(self) -> Sample:
        """The timing of all scores."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Sample(**self._read())

    def scores(self) -> dict[str, Any]:
        """The scores of the last timing, ``[layer, head, layer, head]`` for each port."""
        import torch

        loaded: dict[str, Any] = torch.load(self._folder / "scores.pt")
        return loaded

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"TransformerLens ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


# --- measuring ------------------------------------------------------------------------------------


def measure(
    works: dict[str, Callable[[], object]], peer: Peer | None, options: argparse.Namespace
) -> list[dict[str, Sample]]:
    """Samples per round and work."""
    for work in works.values():
        work()
    asked: dict[str, Callable[[], Sample]] = {
        name: lambda work=work: timed(work) for name, work in works.items()
    }
    if peer:
        asked[LENS] = peer.ask
    rounds = []
    for index in range(options.rounds):
        # Every second round runs backwards, so that no work always follows the same neighbour.
        order = list(asked) if index % 2 == 0 else list(reversed(asked))
        found = {}
        for name in order:
            wait_until_quiet(options.wait)
            found[name] = asked[name]()
        found["composition + copying"] = together(found["composition"], found["copying"])
        rounds.append(found)
    return rounds


def together(one: Sample, two: Sample) -> Sample:
    """Two works, one after the other."""
    foreign = [sample.foreign_cores for sample in (one, two)]
    return Sample(
        one.seconds + two.seconds,
        one.cpu_seconds + two.cpu_seconds,
        max((value for value in foreign if value is not None), default=None),
    )


def difference(found: Any, peer: Peer) -> float:
    """Largest difference of raw scores between heads of different layers."""
    scores = peer.scores()
    apart = []
    for port in PORTS:
        ours, theirs = found.raw[port], scores[port].flatten(2).flatten(0, 1).double()
        apart.append(float((ours - theirs)[ours.isfinite()].abs().max()))
    return max(apart)


def summarize(rounds: list[dict[str, Sample]]) -> dict[str, Any]:
    """Per work: seconds, ratios to CircuitLab's compositions, foreign cores."""
    summary: dict[str, Any] = {}
    for name in ("composition", "copying", "composition + copying", LENS):
        if name not in rounds[0]:
            continue
        foreign = [f for r in rounds if (f := r[name].foreign_cores) is not None]
        summary[name] = {
            "seconds": spread([r[name].seconds for r in rounds]),
            "x composition": ratios(rounds, name, "composition"),
            "foreign_cores": max(foreign) if foreign else None,
        }
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    rows = [["work", "seconds", "x composition", "foreign cores"]]
    for name, row in summary.items():
        cells = [
            f"{row[head]['median']:.3g} ({row[head]['min']:.3g} - {row[head]['max']:.3g})"
            for head in rows[0][1:3]
        ]
        foreign = row["foreign_cores"]
        rows.append([name, *cells, "" if foreign is None else f"{foreign:.1f}"])
    return markdown(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--transformer-lens", metavar="PYTHON", help="of its environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--wait", type=float, default=60.0, help="longest wait for a quiet machine, seconds a work"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--serve", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; give 1 or more")
    return options


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; 1 if the two libraries' scores differ."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    options = parse(arguments)
    if options.serve:
        return serve(options.serve, options.threads)
    import torch
    from circuitlab_attention_heads.composition import compositions
    from circuitlab_attention_heads.copying import copying

    import circuitlab

    torch.set_num_threads(options.threads)
    module = uneven_model(options.shape)
    model = circuitlab.load_model((module, None))
    works: dict[str, Callable[[], object]] = {
        "composition": lambda: compositions(model),
        "copying": lambda: copying(model),
    }
    apart = None
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if options.transformer_lens:
            peer = Peer(options.transformer_lens, Path(folder), module, options.threads)
        rounds = measure(works, peer, options)
        if peer:
            apart = difference(compositions(model), peer)
            peer.close()
    summary = summarize(rounds)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    document = {
        "settings": settings | SHAPES[options.shape],
        "versions": versions() | (peer.versions if peer else {}),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "largest difference": apart,
        "summary": summary,
        "rounds": [{name: asdict(sample) for name, sample in r.items()} for r in rounds],
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(table(summary))
    if apart is not None:
        print(f"\nraw scores differ from TransformerLens's by {apart:.1e} at most")
    return int(apart is not None and apart > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
