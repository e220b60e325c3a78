import pytest
import torch
from transformers import Starcoder2Config, Starcoder2ForCausalLM

import circuitlab
from circuitlab.testing import check_analysis, toy_task


@pytest.fixture(scope="module")
def module():
    """A small random StarCoder 2."""
    torch.manual_seed(0)
    config = Starcoder2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        sliding_window=4,
        use_bias=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    module = Starcoder2ForCausalLM(config).eval()
    module.set_attn_implementation("eager")  # fused attention keeps no patterns
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return module


def test_is_described(module):
    """It loads, and the self-check of a described family passes."""
    model = circuitlab.load_model((module, None))
    assert model.architecture.family == "StarCoder 2"
    assert (model.n_layers, model.n_heads) == (2, 4)


@pytest.mark.parametrize("analysis", ["edge-attribution", "path-patching", "attention-heads"])
def test_analyses_run(module, analysis):
    """Analyses of heads and edges do on it what they do on GPT-2."""
    check_analysis(analysis, model=circuitlab.load_model((module, None)), task=toy_task())
