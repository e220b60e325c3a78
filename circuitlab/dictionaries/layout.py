"""The layout of SAELens: the names of its architectures, keys and tensors, in all its versions.

Versions from 6 keep what a dictionary computes at the top and what it was trained on under
``metadata``; earlier ones have both at the top, with all options of the training. Nothing here
needs SAELens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuitlab.dictionaries.dictionary import Dictionary
from circuitlab.dictionaries.info import DictionaryInfo
from circuitlab.dictionaries.parameters import parameter_shapes

#: The section of ``metadata`` that SAELens does not know.
OWN = "circuitlab"
SCHEMA = "circuitlab-dictionary/1"
#: Version of SAELens whose layout is written.
VERSION = "6.0.0"

_KINDS = {"": "relu", "topk_": "topk", "jumprelu_": "jumprelu", "gated_": "gated"}
#: Name -> nonlinearity, whether it is a transcoder, whether it has a skip.
ARCHITECTURES = {
    "standard": ("relu", False, False),
    "topk": ("topk", False, False),
    "jumprelu": ("jumprelu", False, False),
    "gated": ("gated", False, False),
} | {
    f"{prefix}{skip}transcoder": (kind, True, bool(skip))
    for prefix, kind in _KINDS.items()
    for skip in ("", "skip_")
}

#: Types of tensors, as files name them.
TYPES = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "torch.")
    for name in ("float16", "bfloat16", "float32", "float64")
)
#: Earlier names of keys.
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "out_hook_point": "hook_name_out",
    "out_hook_point_layer": "hook_layer_out",
    "activation_fn_str": "activation_fn",
    "uses_scaling_factor": "finetuning_scaling_factor",
}
#: Keys that say what it was trained on: under ``metadata``, earlier at the top.
FACTS = (
    "hook_name",
    "hook_layer",
    "hook_head_index",
    "hook_name_out",
    "hook_layer_out",
    "hook_head_index_out",
    "model_name",
    "context_size",
    "prepend_bos",
    "dataset_path",
)
_TRAINING = """
    act_store_device adam_beta1 adam_beta2 autocast autocast_lm aux_loss_coefficient
    b_dec_init_method cached_activations_path checkpoint_path compile_llm compile_sae
    dataset_trust_remote_code dead_feature_estimation_method dead_feature_threshold
    dead_feature_window decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm
    decoder_orthogonal_init disable_concat_sequences eval_batch_size_prompts
    eval_every_n_wandb_logs exclude_special_tokens expansion_factor feature_reinit_scale
    feature_sampling_method feature_sampling_window finetuning_method finetuning_tokens
    from_pretrained_path hook_eval hook_point_eval init_encoder_as_decoder_transpose
    is_dataset_tokenized jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode
    jumprelu_tanh_scale l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps
    llm_compilation_mode log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb
    logger lp_norm lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps model_class_name
    model_from_pretrained_kwargs model_kwargs mse_loss_normalization n_batches_in_buffer
    n_checkpoints n_eval_batches n_restart_cycles neuronpedia_id noise_scale normalize_sae_decoder
    pre_act_loss_coefficient resample_batches resume run_name sae_class_name sae_compilation_mode
    sae_lens_training_version sae_lens_version scale_sparsity_penalty_by_decoder_norm seed
    seqpos_slice sequence_separator_token store_batch_size store_batch_size_prompts streaming
    tokens_per_buffer topk_threshold_lr total_training_tokens train_batch_size
    train_batch_size_tokens training_tokens use_cached_activations use_ghost_grads
    use_sparse_activations verbose wandb_entity wandb_id wandb_log_frequency wandb_project
"""
#: Options of the training, which do not change what the dictionary computes.
TRAINING = frozenset(_TRAINING.split())


@dataclass(frozen=True)
class Layout:
    """What a ``cfg.json`` says of a dictionary.

    Attributes:
        nonlinearity: As :attr:`Dictionary.nonlinearity`.
        transcoder: Whether it writes another site than it reads.
        skip: Whether it has a skip.
        d_in, n, d_out: Sizes.
        k: For ``topk``, else None.
        apply_b_dec_to_input: See :class:`Dictionary`.
        rescale: Whether latents are compared and kept in units of their decoder row's norm.
        finetuned: Whether the file has a scale for each latent, applied before the decoder.
        scaled: Whether it was trained on activations times a constant.
        own: The section that SAELens does not know; empty in files of others.
        info: What it was trained on.
    """

    nonlinearity: str
    transcoder: bool
    skip: bool
    d_in: int
    n: int
    d_out: int
    k: int | None
    apply_b_dec_to_input: bool
    rescale: bool
    finetuned: bool
    scaled: bool
    own: Mapping[str, Any]
    info: DictionaryInfo

    def tensors(self) -> dict[str, list[int]]:
        """Names and shapes of the tensors that the file must have."""
        bias = "b_gate" if self.nonlinearity == "gated" else "b_enc"
        names = {"W_enc": "W_e", bias: "b_e", "W_dec": "W_d", "b_dec": "b_d"}
        extra = {"jumprelu": ["threshold"], "gated": ["r_mag", "b_mag"]}
        names |= {name: name for name in extra.get(self.nonlinearity, [])}
        shapes = parameter_shapes(self.d_in, self.n, self.d_out)
        found = {name: shapes[own] for name, own in names.items()}
        if self.skip:
            found["W_skip"] = [self.d_out, self.d_in]
        return found

    def dictionary(
        self, tensors: Mapping[str, Tensor], factors: Tensor | None, scale: float | None
    ) -> Dictionary:
        """The dictionary, with every scale folded into its weights.

        Args:
            tensors: Those of :meth:`tensors`.
            factors: Scale of each latent before the decoder, ``[n]``, if it has any.
            scale: What activations were multiplied by in training.
        """
        found = dict(tensors)
        bias = "b_gate" if self.nonlinearity == "gated" else "b_enc"
        if self.rescale:
            norms = found["W_dec"].double().norm(dim=1)
            found["W_enc"] = found["W_enc"] * norms
            found[bias] = found[bias] * norms
            found["W_dec"] = found["W_dec"] / torch.where(norms > 0, norms, 1.0)[:, None]
        if factors is not None:
            found["W_dec"] = found["W_dec"] * factors[:, None].double()
        dtype = torch.promote_types(tensors["W_enc"].dtype, torch.float32)
        given = {name: tensor.to(dtype) for name, tensor in found.items()}
        extra: dict[str, Any] = {
            name: given[name] for name in ("threshold", "r_mag", "b_mag") if name in given
        }
        if self.skip:
            extra["w_skip"] = given["W_skip"].T
        dictionary = Dictionary(
            given["W_enc"],
            given[bias],
            given["W_dec"],
            given["b_dec"],
            apply_b_dec_to_input=self.apply_b_dec_to_input,
            k=self.k,
            transcoder=self.transcoder,
            bandwidth=self.own.get("bandwidth", 0.001),
            info=self.info,
            **extra,
        )
        return dictionary if scale is None else dictionary.rescaled(scale)
