"""Files as SAELens writes them, in three generations, and what it documents that they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D, N = 5, 9

#: The fields of SAELens 6 for every dictionary, and those that some have beside them.
FIELDS = {
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "metadata",
}
MORE = {"topk": {"k", "rescale_acts_by_decoder_norm"}} | {
    f"{kind}{skip}transcoder": {"d_out"} for kind in ("", "jumprelu_") for skip in ("", "skip_")
}

#: ``cfg.json`` of the first releases, with all options of the training.
FIRST: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.0.hook_resid_pre",
    "hook_point_layer": 0,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "is_dataset_tokenized": False,
    "context_size": 128,
    "use_cached_activations": False,
    "cached_activations_path": "activations/blocks.0.hook_resid_pre",
    "d_in": D,
    "n_batches_in_buffer": 128,
    "total_training_tokens": 300000000,
    "store_batch_size": 32,
    "device": "cpu",
    "seed": 42,
    "dtype": "torch.float32",
    "b_dec_init_method": "geometric_median",
    "expansion_factor": 32,
    "from_pretrained_path": None,
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
    "lr_scheduler_name": None,
    "lr_warm_up_steps": 5000,
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
    "train_batch_size": 4096,
    "use_ghost_grads": False,
    "feature_sampling_window": 1000,
    "feature_sampling_method": None,
    "resample_batches": 1028,
    "feature_reinit_scale": 0.2,
    "dead_feature_window": 5000,
    "dead_feature_estimation_method": "no_fire",
    "dead_feature_threshold": 1e-08,
    "log_to_wandb": True,
    "wandb_project": "a project",
    "wandb_entity": None,
    "wandb_log_frequency": 100,
    "n_checkpoints": 10,
    "checkpoint_path": "checkpoints/1",
    "d_sae": N,
    "tokens_per_buffer": 67108864,
    "run_name": "a run",
}
#: Versions 3 to 5.
MIDDLE: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": False,
    "finetuning_scaling_factor": False,
    "context_size": 1024,
    "model_name": "gpt2",
    "hook_name": "blocks.3.hook_mlp_out",
    "hook_layer": 3,
    "hook_head_index": None,
    "prepend_bos": True,
    "dataset_path": "monology/pile-uncopyrighted",
    "dataset_trust_remote_code": True,
    "normalize_activations": "none",
    "dtype": "float32",
    "device": "cpu",
    "sae_lens_training_version": "3.20.4",
    "neuronpedia_id": None,
    "model_from_pretrained_kwargs": {},
    "seqpos_slice": [None],
}
#: From version 6.
PRESENT: dict[str, Any] = {
    "d_in": D,
    "d_sae": N,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.12.1",
        "sae_lens_training_version": "6.12.1",
        "model_name": "gpt2",
        "hook_name": "blocks.11.hook_resid_post",
        "hook_head_index": None,
        "context_size": 256,
        "prepend_bos": False,
        "dataset_path": "text",
        "seqpos_slice": [None],
        "l0": 31.5,
    },
    "architecture": "standard",
}


def tensors_of(architecture: str, seed: int = 0) -> dict[str, Tensor]:
    """Tensors as SAELens names and shapes them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    d_out = D + 2 if "transcoder" in architecture else D
    found = {"W_enc": normal(D, N), "W_dec": normal(N, d_out), "b_dec": normal(d_out)}
    if architecture == "gated":
        found |= {"b_gate": normal(N), "r_mag": normal(N), "b_mag": normal(N)}
    else:
        found["b_enc"] = normal(N)
    if "jumprelu" in architecture:
        found["threshold"] = normal(N)
    if "skip" in architecture:
        found["W_skip"] = normal(d_out, D)
    return found


def as_documented(config: dict[str, Any], found: dict[str, Tensor], x: Tensor) -> Tensor:
    """The reconstruction that SAELens documents for a file, step by step, float64."""
    t = {name: tensor.double() for name, tensor in found.items()}
    scale = config.get("scale", 1.0)
    architecture = config.get("architecture", "standard")
    whole, x = x, x * scale
    if config.get("apply_b_dec_to_input", "transcoder" not in architecture):
        x = x - t["b_dec"]
    if "b_gate" in t:
        gate = x @ t["W_enc"] + t["b_gate"] > 0
        z = gate * (x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    else:
        pre = x @ t["W_enc"] + t["b_enc"]
        norms = t["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm") else 1.0
        z = (pre * norms).relu()
        if "threshold" in t:
            z = z * (pre > t["threshold"])
        if k := config.get("k", config.get("activation_fn_kwargs", {}).get("k")):
            z = z * (pre * norms >= (pre * norms).sort(-1, descending=True)[0][..., k - 1 : k])
        z = z / norms
    z = z * t.get("finetuning_scaling_factor", t.get("scaling_factor", torch.ones(N)))
    written = (z @ t["W_dec"] + t["b_dec"]) / scale
    return written + whole @ t["W_skip"].T if "W_skip" in t else written


def save_folder(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Path:
    """Write a folder as SAELens does, over what is there."""
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder
