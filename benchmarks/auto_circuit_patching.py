"""auto-circuit's edge patching and ACDC step, timed on request; runs in an environment of its own.

    python benchmarks/auto_circuit_patching.py FOLDER --threads 2

``Peer`` starts it and asks. FOLDER has a GPT-2 as ``save_pretrained`` writes it and
``prompts.json`` with clean, corrupt, right and wrong token ids. A line of standard input is a
request ``{"work": "edge" | "acdc", "edges": [[source, target, port], ...]}``, its answer a line of
standard output: the timing of one edge as the fields of a ``Sample``, and for ``edge`` the effect
of each edge on each pair. See benchmarks/README.md for how to make the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_attribution import timed
from summary import Sample

PACKAGES = ("auto-circuit", "transformer-lens", "transformers", "torch")


def lens_model(folder: Path) -> Any:
    """The GPT-2 of a folder as a ``HookedTransformer``, no weight folded, inputs split by head."""
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
            default_prepend_bos=False,
            use_attn_result=True,
            use_split_qkv_input=True,
            use_hook_mlp_in=True,
        )
    )
    lens.load_and_process_state_dict(
        convert_gpt2_weights(module, lens.cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return lens.eval().requires_grad_(False)


def edge_name(source: str, target: str, port: str) -> str:
    """auto-circuit's name of an edge: ``a0.h1``, ``a2.h3``, ``q`` -> ``A0.1->A2.3.Q``."""

    def name(component: str) -> str:
        ends = {"input": "Resid Start", "logits": "Resid End"}
        if component in ends:
            return ends[component]
        if component.startswith("m"):
            return f"MLP {component[1:]}"
        return "A" + component[1:].replace(".h", ".")

    return f"{name(source)}->{name(target)}" + (f".{port.upper()}" if port else "")


class AutoCircuit:
    """A patchable model with its clean and corrupt runs, and the two works on it."""

    def __init__(self, folder: Path) -> None:
        import torch
        from auto_circuit.utils.ablation_activations import src_ablations
        from auto_circuit.utils.graph_utils import patchable_model

        prompts = json.loads((folder / "prompts.json").read_text())
        self.clean, corrupt, self.right, self.wrong = (
            torch.tensor(prompts[key]) for key in ("clean", "corrupt", "right", "wrong")
        )
        self.model = patchable_model(
            lens_model(folder), factorized=True, slice_output="last_seq", separate_qkv=True
        )
        self.edges = {edge.name: edge for edge in self.model.edges}
        self.ablated = src_ablations(self.model, corrupt)
        self.outputs = src_ablations(self.model, self.clean)
        with torch.inference_mode():
            _, cache = self.model.run_with_cache(self.clean)
            layers = range(self.model.cfg.n_layers)
            self.streams = [cache[f"blocks.{n}.hook_resid_pre"].clone() for n in layers]
            self.logits = self.model(self.clean)[self.model.out_slice]

    def metric(self, logits: Any) -> Any:
        """Right minus wrong answer's logit, ``[pairs]``."""
        right = logits.gather(1, self.right[:, None])
        return (right - logits.gather(1, self.wrong[:, None]))[:, 0]

    def patched(self, edge: Any) -> Any:
        """Logits ``[pairs, vocab]`` with one edge patched, as its documentation does it."""
        import torch
        from auto_circuit.utils.graph_utils import patch_mode

        with patch_mode(self.model, self.ablated, edges=[edge]), torch.inference_mode():
            return self.model(self.clean)[self.model.out_slice]

    def acdc_steps(self, edges: list[Any]) -> Callable[[], None]:
        """The inner loop of ``acdc_prune_scores`` for some edges, each of them put back after.

        Making what the loop starts from is preparation, as before that loop.
        """
        import torch
        from auto_circuit.utils.graph_utils import patch_mode, set_all_masks
        from auto_circuit.utils.tensor_ops import multibatch_kl_div

        model = self.model
        with torch.inference_mode():
            _, tokens, short, mask = model.input_to_embed(self.clean)
        clean = torch.log_softmax(self.logits, dim=-1)

        def work() -> None:
            set_all_masks(model, val=0.0)
            with patch_mode(model, self.ablated, curr_src_outs=self.outputs.clone()):
                for edge in edges:
                    edge.patch_mask(model).data[edge.patch_idx] = 1.0
                    start = int(edge.dest.module_name.split(".")[1])
                    with torch.inference_mode():
                        out = model(
                            self.streams[start],
                            start_at_layer=start,
                            tokens=tokens,
                            shortformer_pos_embed=short,
                            attention_mask=mask,
                        )[model.out_slice]
                    multibatch_kl_div(torch.log_softmax(out, dim=-1), clean).item()
                    edge.patch_mask(model).data[edge.patch_idx] = 0.0

        return work

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time one request."""
        edges = [self.edges[edge_name(*names)] for names in request["edges"]]
        if request["work"] == "acdc":
            return asdict(per_edge(timed(self.acdc_steps(edges)), len(edges)))
        logits: list[Any] = []
        sample = timed(lambda: logits.extend(map(self.patched, edges)))
        base = self.metric(self.logits)
        effects = [(self.metric(one) - base).tolist() for one in logits]
        return {**asdict(per_edge(sample, len(edges))), "effects": effects}


def per_edge(sample: Sample, n: int) -> Sample:
    """A timing of n edges as that of one."""
    return Sample(sample.seconds / n, sample.cpu_seconds / n, sample.foreign_cores)


class Peer:
    """auto-circuit in a process of its own environment, idle unless it is asked.

    Args:
        python: The environment's interpreter.
        folder: Where model and prompts may be written.
        module: A ``GPT2LMHeadModel``.
        prompts: ``Prompts``.
        edges: What is patched at each request.
        threads: Of PyTorch.

    Attributes:
        versions: Of the packages in its environment.
        effects: Effect of each edge on each pair; empty before ``edge`` was asked.
    """

    def __init__(
        self, python: str, folder: Path, module: Any, prompts: Any, edges: list[Any], threads: int
    ) -> None:
        module.save_pretrained(folder)
        columns = {key: value.tolist() for key, value in vars(prompts).items()}
        (folder / "prompts.json").write_text(json.dumps(columns))
        command = [python, __file__, str(folder), "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.edges = edges
        self.effects: list[list[float]] = []
        self.versions: dict[str, str] = self._read()["versions"]

    def ask(self, work: str) -> Sample:
        """The timing of one edge; ``work`` is ``edge`` or ``acdc``."""
        self._process.stdin.write(json.dumps({"work": work, "edges": self.edges}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self.effects = answer.pop("effects", self.effects)
        return Sample(**answer)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"auto-circuit ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(arguments: list[str]) -> int:
    """Answer requests until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    warnings.filterwarnings("ignore")
    # Libraries that print must not print into the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch

    torch.set_num_threads(options.threads)
    circuit = AutoCircuit(options.folder)
    found = {package: version(package) for package in PACKAGES}
    print(json.dumps({"versions": found}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(circuit.answer(json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
