"""Learner: one site's dictionary while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitlab import Dictionary
from circuitlab_feature_interactions.losses import Moments, project_gradient, restore_norms
from circuitlab_feature_interactions.steering import Steering

#: Share of a step in the running mean of a latent's size.
_RUNNING = 0.01


@dataclass(eq=False)
class Learner:
    """A dictionary, its optimiser, and what was seen of its latents.

    Attributes:
        dictionary: What is trained.
        optimiser: Its Adam.
        moments: Of what it should write.
        silent: Tokens since each latent was active, ``[n]``, int64.
        size: Running sum of each latent and of how often it was active, ``[2, n]``.
        sparsity: Weight of the sparsity term.
        read: Of what a transcoder reads; None for an autoencoder, which takes its ``b_d`` off.
    """

    dictionary: Dictionary
    optimiser: torch.optim.Adam
    moments: Moments
    silent: Tensor
    size: Tensor
    sparsity: Steering
    read: Moments | None = None

    @classmethod
    def of(
        cls,
        dictionary: Dictionary,
        moments: Moments,
        rate: float,
        sparsity: Steering,
        read: Moments | None = None,
    ) -> Learner:
        """A learner that has seen nothing.

        The learning rate of what has the unit of what is written (``b_d``, biases and thresholds of
        latents) is in that unit, and that of a transcoder's encoder in it per unit of what is read,
        so that scaling all activations changes nothing but them.
        """
        named = dict(dictionary.named_parameters())
        maps = [named[name] for name in ("W_d", "r_mag") if name in named]
        offsets = [p for name, p in named.items() if name not in ("W_e", "W_d", "r_mag")]
        groups = [
            {"params": [named["W_e"]], "full": rate * (moments.unit / read.unit if read else 1.0)},
            {"params": maps, "full": rate},
            {"params": offsets, "full": rate * moments.unit},
        ]
        optimiser = torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.999), eps=1e-10)
        n, device = dictionary.n, dictionary.W_e.device
        silent = torch.zeros(n, dtype=torch.int64, device=device)
        size = torch.zeros(2, n, dtype=torch.float64, device=device)
        return cls(dictionary, optimiser, moments, silent, size, sparsity, read)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step along the gradients, at a share of the learning rate.

        A transcoder's is that of one whose biases are counted from the mean of what it reads: a
        large mean would turn every change of an encoder into one of its bias.
        """
        encoder, bias = self.dictionary.W_e, self.dictionary.b_e
        project_gradient(self.dictionary)
        if self.read is not None and encoder.grad is not None and bias.grad is not None:
            encoder.grad -= torch.outer(self.read.mean, bias.grad)
            bias += self.read.mean @ encoder
        for group in self.optimiser.param_groups:
            group["lr"] = share * group["full"]
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.read is not None:
            bias -= self.read.mean @ encoder
        restore_norms(self.dictionary)

    def note(self, z: Tensor) -> None:
        """Note which latents are active, and how much, from ``[n_tokens, n]``."""
        active = z > 0
        counts = active.sum(0)
        self.silent = torch.where(counts > 0, 0, self.silent + len(z))
        new = torch.stack([z.sum(0, dtype=torch.float64), counts.double()]) / len(z)
        self.size = new if not self.size.any() else self.size.lerp(new, _RUNNING)

    @property
    def scale(self) -> Tensor:
        """Mean of each latent where it is active, ``[n]``; that of all for one that never was."""
        total, count = self.size
        mean = total / count.clamp(min=1e-30)
        overall = total.sum() / count.sum().clamp(min=1e-30)
        return torch.where(count > 0, mean, overall).to(self.dictionary.W_e.dtype)

    def state(self) -> dict[str, Tensor]:
        """All that changes in training, by name."""
        found = {"silent": self.silent, "size": self.size, "sparsity": self.sparsity.state()}
        for name, parameter in self.dictionary.named_parameters():
            found[f"parameter/{name}"] = parameter
            for key, value in self.optimiser.state[parameter].items():
                found[f"{key}/{name}"] = value
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of the same settings."""
        self.silent = state["silent"].to(self.silent.device)
        self.size = state["size"].to(self.size.device)
        self.sparsity.load(state["sparsity"])
        for name, parameter in self.dictionary.named_parameters():
            parameter.copy_(state[f"parameter/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := state.get(f"{key}/{name}")) is not None:
                    # Adam keeps its count on the CPU.
                    device = value.device if key == "step" else parameter.device
                    self.optimiser.state[parameter][key] = value.to(device)
