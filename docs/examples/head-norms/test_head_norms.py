import torch
from circuitlab_head_norms import head_norms

from circuitlab import Site
from circuitlab.testing import check_analysis, tiny_model, toy_task


def test_contract():
    """The analysis does what CircuitLab expects of every analysis."""
    check_analysis("head-norms")


def test_is_the_norm_of_the_change():
    """Scores are what reading z of whole layers gives, largest first."""
    model, pairs = tiny_model(), tiny_model().encode(toy_task())
    by_hand = []
    for layer in range(model.n_layers):
        site = Site("z", layer)
        clean, corrupt = (model.run(p, read=[site])[site] for p in (pairs.clean, pairs.corrupt))
        by_hand += (corrupt - clean)[:, -1].norm(dim=-1).mean(0).tolist()
    scores = [score for *_, score in head_norms(model, toy_task(), top=2).effects()]
    assert torch.allclose(torch.tensor(scores), torch.tensor(sorted(by_hand)[:1:-1]))
