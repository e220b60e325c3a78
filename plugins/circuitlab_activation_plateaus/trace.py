"""Activation plateaus: where the output stays and jumps between two activations, and what jumps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import CircuitGraph, OptionError, QualityError, read_dictionary
from circuitlab_activation_plateaus.comparison import (
    QUANTITIES,
    add_panels,
    common,
    compare,
    findings,
    middle,
    plain,
    values,
)
from circuitlab_activation_plateaus.protocols.published import PROTOCOLS, add_protocols
from circuitlab_activation_plateaus.pushes.families import FAMILIES
from circuitlab_activation_plateaus.pushes.sensitivity import add_directions
from circuitlab_activation_plateaus.sharpness.checkpoints import add_checkpoints
from circuitlab_activation_plateaus.sharpness.circuits import sharpening_circuit
from circuitlab_activation_plateaus.sharpness.freezing import KINDS
from circuitlab_activation_plateaus.sharpness.gates import add_gates, gate_flips, gate_sites
from circuitlab_activation_plateaus.sharpness.layers import add_layers, layer_sites
from circuitlab_activation_plateaus.walks.bundle import (
    DISTANCES,
    Bundle,
    Settings,
    measure,
    parse_site,
    parse_stream,
)
from circuitlab_activation_plateaus.walks.pairs import Bank, make_bank
from circuitlab_activation_plateaus.walks.paths import PATHS
from circuitlab_activation_plateaus.walks.responses import RESPONSES

if TYPE_CHECKING:
    from circuitlab import Dictionary, Site, Task, TracedModel

#: Largest misfit at the end of a walk, in types of 32 bits or more, and in narrower ones.
MISFIT, NARROW_MISFIT = 1e-3, 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is walked, how, and what else is told.

    Attributes:
        pairs: See :func:`.walks.pairs.make_bank`.
        bank_size: Pairs, at most.
        site: The residual stream that is replaced at the last position.
        path: ``slerp``, ``lerp``, or ``embed`` (straight, at ``resid_pre.0``).
        steps: Points of the even grid.
        refine: Times the steepest interval of each pair is halved.
        read: Streams of the table through the layers: ``all`` or ``none``, or names with commas.
        response: ``d-sym``, ``d-rel``, ``kl`` or ``jsd`` of the logits; layers and freezing take
            ``d-sym`` where it is no distance.
        freeze: Parts to hold, ``all``, ``none``, or some of ``attn``, ``mlp``, ``ln``, ``heads``.
        top: Components of the circuit, by the absolute score.
        controls: Re-initialised models that walk the same pairs.
        directions: Families of directions to push along, or ``all``; None for none.
        centers: Where pushes start.
        protocol: One of the published ones, ``all`` or ``none``.
        dictionary: Folder of an autoencoder of the site.
        checkpoints: Folder of model folders.
        batch_size: Steps per pass; None chooses.
    """

    pairs: str = "last-token"
    bank_size: int = 64
    site: str = "resid_post.0"
    path: str = "slerp"
    steps: int = 51
    refine: int = 4
    read: str = "all"
    response: str = "d-sym"
    freeze: str = "all"
    top: int | Literal["all"] = 40
    controls: int = 1
    directions: str | None = None
    centers: str = "real,gaussian"
    protocol: str = "none"
    dictionary: Path | None = None
    checkpoints: Path | None = None
    batch_size: int | None = None


def activation_plateaus(model: TracedModel, task: Task | None, options: Options) -> CircuitGraph:
    """Walk from activation to activation, see how the output answers, and what sharpens its jumps.

    Args:
        model: Any traced model.
        task: For prompts, where the model has no texts of its own, and for pairs of the task.
        options: What and how.

    Returns:
        The sharpening circuit, see :func:`.sharpness.circuits.sharpening_circuit`; without
        components where nothing was held. ``graph["plateaus"]`` has the settings, ``quantities``
        (medians over pairs, of the model, the site, the controls, and the difference, each with
        its 95 % interval) and the numbers of each pair; ``layers``, ``gate_flips``,
        ``freezing``, ``directions``, ``protocols`` and ``checkpoints`` what these found.

    Raises:
        OptionError: an option is out of range, or needs what is not there; something is to be held,
            and only the blocks of the model are known.
        TaskError: no pair can be made, or none has two different outputs.
        QualityError: B's activation in A's context does not give what B gives although it should.
        NumericsError: logits are not finite.
    """
    _check(options, model)
    seed = torch.initial_seed()
    site = parse_site(options.site, model.n_layers, options.path)
    streams = _streams(options.read, model, site)
    latents = _dictionary(options, model)
    bank = make_bank(model, task, options.pairs, options.bank_size, seed)
    work = _Work(model, task, options, bank, _settings(options, site), latents, seed)
    sites = sorted({*streams, *gate_sites(model, site)}) if streams else []
    own = measure(model, bank, work.settings, "walking", read=sites)
    _check_ends(own, bank, model)
    controls = [
        measure(model.reinitialised(seed + number), bank, work.settings, f"control {number}")
        for number in range(1, options.controls + 1)
    ]
    circuit = _sharpened(work)
    _tell(circuit, work, own, controls)
    if streams and own.walks is not None:
        kept = {stream: own.walks.read[stream] for stream in streams}
        add_layers(circuit, replace(own.walks, read=kept), work.distance, seed)
        add_gates(circuit, own.walks, gate_flips(model, site, own.walks), seed)
    _add_others(circuit, work)
    return circuit


@dataclass(frozen=True, eq=False)
class _Work:
    """What all parts of the analysis share."""

    model: TracedModel
    task: Task | None
    options: Options
    bank: Bank
    settings: Settings
    dictionary: Dictionary | None
    seed: int

    @property
    def distance(self) -> str:
        """The response, or a distance where it is none."""
        response = self.settings.response
        return response if response in DISTANCES else DISTANCES[0]


# --- options --------------------------------------------------------------------------------------


def _check(options: Options, model: TracedModel) -> None:
    """Refuse what would only be refused after the walks."""
    known: dict[str, Collection[str]] = {
        "path": PATHS,
        "response": RESPONSES,
        "protocol": (*PROTOCOLS, "all", "none"),
    }
    for name, words in known.items():
        value = getattr(options, name)
        if value not in words:
            raise OptionError(f"--{name} {value!r} is unknown; use {', '.join(words)}")
    if model.architecture.blocks_only and options.freeze != "none":
        raise OptionError(
            f"--freeze {options.freeze} holds heads, MLPs and norms, and only the blocks of model "
            f"{model.name!r} are known; give --freeze none"
        )
    if options.controls < 0:
        raise OptionError(f"--controls {options.controls} is below 0; give 0 for none")


def _settings(options: Options, site: Site) -> Settings:
    return Settings(
        site,
        options.path,
        options.response,
        options.steps,
        options.refine,
        options.batch_size,
    )


def _dictionary(options: Options, model: TracedModel) -> Dictionary | None:
    if options.dictionary is None:
        return None
    return read_dictionary(options.dictionary, device=model.device)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _streams(text: str, model: TracedModel, site: Site) -> list[Site]:
    """The streams to read, in order; none for ``none``."""
    if text == "none":
        return []
    if text == "all":
        return layer_sites(model, site) or [site]
    return sorted({parse_stream(name, model.n_layers, "--read") for name in _names(text)})


def _families(work: _Work) -> str:
    """Families of directions, with commas; ``all`` are those that have what they need."""
    if work.options.directions != "all":
        return work.options.directions or ""
    needed = {
        "dictionary": work.dictionary,
        "dictionary-error": work.dictionary,
        "mean-difference": work.task,
    }
    return ",".join(name for name in FAMILIES if name not in needed or needed[name] is not None)


# --- what was measured ----------------------------------------------------------------------------


def _check_ends(own: Bundle, bank: Bank, model: TracedModel) -> None:
    """Refuse walks whose last point does not give what B gives although it should."""
    if not bank.same_prefix:
        return
    loose = MISFIT if torch.finfo(model.dtype).bits >= 32 else NARROW_MISFIT
    worst = int(own.misfit.argmax())
    if float(own.misfit[worst]) > loose:
        raise QualityError(
            f"pair {own.rows[worst] + 1}: the activation of B in the context of A gives logits "
            f"{float(own.misfit[worst]):.2g} of their norm away from B's, although only the last "
            f"token differs; the model's sites are not what they should be: run circuitlab doctor"
        )


def _sharpened(work: _Work) -> CircuitGraph:
    """The sharpening circuit; without components where nothing is to be held."""
    text, model = work.options.freeze, work.model
    if text == "none":
        circuit = CircuitGraph(score="nothing was held, so there are no effects")
        circuit.add_component("logits", kind="logits", layer=model.n_layers)
        return circuit
    kinds = KINDS if text == "all" else _names(text)
    settings = replace(work.settings, response=work.distance)
    return sharpening_circuit(
        model, work.bank, settings, kinds=kinds, top=work.options.top, seed=work.seed
    )


def _tell(circuit: CircuitGraph, work: _Work, model: Bundle, others: Sequence[Bundle]) -> None:
    """Put the curves and their numbers in front of what the circuit says of its parts."""
    graph, bank, settings = circuit.graph, work.bank, work.settings
    own, *controls = common([model, *others])
    quantities = compare(own, controls, work.seed)
    said, plots = graph.pop("findings", {}), graph.pop("plots", [])
    graph["findings"] = findings(quantities, own)
    if not bank.same_prefix:
        graph["findings"]["carried by the stream"] = (
            f"{middle(own.reach):.0%} of the way from A's output to B's, median: B's activation "
            f"is put into the context of A"
        )
    graph["findings"] |= said
    add_panels(
        circuit,
        own,
        controls,
        quantities,
        response=settings.response,
        title=f"From A to B: {settings.path} at {settings.site}, pairs {bank.kind}",
        seed=work.seed,
    )
    graph["plots"] += plots
    graph["plateaus"] = {
        "site": str(settings.site),
        "path": settings.path,
        "response": settings.response,
        "steps": settings.steps,
        "refine": settings.refine,
        "kind": bank.kind,
        "same_prefix": bank.same_prefix,
        "n_controls": len(controls),
        "quantities": plain(quantities),
        "pairs": _pairs(own, bank),
    }
    method = (
        f"{len(own.rows)} pairs ({bank.kind}) walked by {settings.path} at {settings.site}, "
        f"{settings.steps} + {settings.refine} points, {settings.response} of centred logits"
    )
    graph["method"] = "; ".join(filter(None, [method, graph.get("method")]))
    if len(own.rows) < len(bank):
        graph.setdefault("warnings", []).append(
            f"{len(bank) - len(own.rows)} of {len(bank)} pairs are left out: A and B are one point "
            f"to rounding, at the site or at the logits"
        )


def _pairs(own: Bundle, bank: Bank) -> list[dict[str, Any]]:
    """The numbers of each pair."""
    columns = {name: values(own, name).tolist() for name in QUANTITIES}
    columns["reach"] = own.reach.tolist()
    return [
        {"pair": row, "a": bank.labels[row][0], "b": bank.labels[row][1]}
        | {name: column[place] for name, column in columns.items()}
        for place, row in enumerate(own.rows)
    ]


def _add_others(circuit: CircuitGraph, work: _Work) -> None:
    """Add what was asked for beside the walks: directions, protocols, checkpoints."""
    options, settings = work.options, work.settings
    if families := _families(work):
        add_directions(
            circuit,
            work.model,
            work.bank,
            settings.site,
            families=families,
            centers=options.centers,
            task=work.task,
            dictionary=work.dictionary,
            seed=work.seed,
            batch_size=options.batch_size,
        )
    if options.protocol != "none":
        add_protocols(
            circuit,
            work.model,
            work.task,
            settings.site,
            names=list(PROTOCOLS) if options.protocol == "all" else [options.protocol],
            n_pairs=options.bank_size,
            dictionary=work.dictionary,
            seed=work.seed,
            batch_size=options.batch_size,
        )
    if options.checkpoints is not None:
        folder = options.checkpoints
        add_checkpoints(circuit, work.model, work.bank, folder, settings, work.seed)
