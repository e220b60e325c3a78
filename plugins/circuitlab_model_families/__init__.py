"""Model families: where models other than GPT-2 keep their attention, MLPs and norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import circuitlab
from circuitlab_model_families.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from circuitlab import Architecture


@circuitlab.hookimpl(trylast=True)
def adapt_architecture(config: PretrainedConfig) -> Architecture | None:
    """GPT-NeoX, Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma, Gemma 2 and 3, OLMo 2, Phi-3."""
    describe = FAMILIES.get(config.model_type)
    return None if describe is None else describe(config)
