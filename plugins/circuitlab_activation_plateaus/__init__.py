"""Activation plateaus: where a model's output stays put and where it jumps, and steering."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import circuitlab

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from circuitlab import CircuitGraph, Task, TracedModel

Pairs = Annotated[
    str, "pairs to walk between: last-token, task, unrelated, or a .jsonl file of a and b"
]
BankSize = Annotated[int, "pairs to walk between, at most"]
WalkedSite = Annotated[str, "residual stream that is replaced at the last position"]
Walk = Annotated[Literal["slerp", "lerp", "embed"], "the way from A to B"]
Batch = Annotated[int | Literal["auto"], "steps per pass"]
Direction = Annotated[
    Literal["mean-difference", "pca", "dictionary", "act-add", "random"],
    "what is added: corrupt - clean; a principal component; a dictionary's latent; one prompt's "
    "activations - another's; or a random vector",
]
SteeredSite = Annotated[
    str | None, "residual stream, as 'resid_pre.1'; the dictionary's or the middle if left out"
]
SteeredPositions = Annotated[
    Literal["auto", "all", "last", "front"],
    "tokens it is added to: all, the last, or from the first on; auto: front for act-add, else all",
]
Unit = Annotated[
    Literal["stream", "raw"],
    "coefficient 1 is the stream's mean norm at the last position, or the vector's own length",
]
Steered = Annotated[Literal["clean", "corrupt"], "prompts that are steered"]
Low = Annotated[float, "smallest coefficient"]
High = Annotated[float, "largest coefficient"]
ScanSteps = Annotated[int, "coefficients, evenly spaced"]
Index = Annotated[int, "pca, dictionary: which component or latent, from 0"]
Corpus = Annotated[int, "pca: of so many of the model's own texts; 0 is the task's prompts"]
ScanDictionary = Annotated[Path | None, "folder of a dictionary"]
Towards = Annotated[str | None, "act-add: prompt whose activations are added"]
Away = Annotated[str | None, "act-add: prompt whose activations are taken off"]
Prefix = Annotated[str | None, "text put before the prompts, to compare steering with prompting"]
Neurons = Annotated[int | None, "layer whose MLP is also taken apart into neurons"]
Controls = Annotated[int, "random vectors of the same length to compare with"]
Top = Annotated[int | Literal["all"], "how many edges to keep, by absolute score"]
Threshold = Annotated[float | None, "keep those of at least this absolute score"]
Rows = Annotated[int | Literal["auto"], "rows, each a prompt with one coefficient, per pass"]


@circuitlab.hookimpl
def register_analyses(register: Callable[..., None]) -> None:
    """Offer ``activation-plateaus``, ``plateau-regions`` and ``injection-scan``."""
    register("activation-plateaus", activation_plateaus, stream_only=True)
    register("plateau-regions", plateau_regions)
    register("injection-scan", injection_scan)


@circuitlab.hookimpl
def register_commands(register: Callable[[str, Callable[..., Mapping[str, Any]]], None]) -> None:
    """Offer ``scan``."""
    register("scan", scan)


def activation_plateaus(
    model: TracedModel,
    task: Task | None = None,
    *,
    pairs: Pairs = "last-token",
    bank_size: BankSize = 64,
    site: WalkedSite = "resid_post.0",
    path: Walk = "slerp",
    steps: Annotated[int, "points of the even grid"] = 51,
    refine: Annotated[int, "times the steepest interval is halved"] = 4,
    read: Annotated[str, "streams to follow: all, none, or as 'resid_post.1, resid_mid.1'"] = "all",
    response: Annotated[
        Literal["d-sym", "d-rel", "kl", "jsd"], "how far the logits have come from A to B"
    ] = "d-sym",
    freeze: Annotated[
        str, "components to hold: all, none, or some of attn, mlp, ln, heads"
    ] = "all",
    top: Annotated[int | Literal["all"], "how many components to keep, by absolute score"] = 40,
    controls: Annotated[int, "re-initialised models to compare with; 0 for none"] = 1,
    directions: Annotated[
        str | None, "also push away from A: families of directions, as 'iso, cov-mixture', or all"
    ] = None,
    centers: Annotated[
        str, "where pushes start: some of real, gaussian, dictionary-bag, dictionary-structured"
    ] = "real,gaussian",
    protocol: Annotated[
        Literal["none", "janiak", "shinkle", "heimersheim", "lee", "giglemiani", "all"],
        "also repeat a published protocol",
    ] = "none",
    dictionary: Annotated[Path | None, "folder of a dictionary of the same stream"] = None,
    checkpoints: Annotated[
        Path | None, "folder of model folders of one training run, as step-000200"
    ] = None,
    batch_size: Batch = "auto",
) -> CircuitGraph:
    """Where outputs stay put and where they jump between two activations, and what sharpens jumps.

    Janiak et al. 2024 (arXiv:2409.17113), Shinkle & Heimersheim 2025; the reference is the same
    distance at the site itself.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "task")}
    from circuitlab_activation_plateaus.trace import Options
    from circuitlab_activation_plateaus.trace import activation_plateaus as trace

    return trace(model, task, Options(**options | {"batch_size": _rows(batch_size)}))


def plateau_regions(
    model: TracedModel,
    task: Task | None = None,
    *,
    pairs: Pairs = "last-token",
    bank_size: BankSize = 64,
    site: WalkedSite = "resid_post.0",
    path: Walk = "slerp",
    steps: Annotated[int, "points of each walk"] = 21,
    regions: Annotated[
        Literal["argmax", "kmeans", "agglomerative"],
        "what makes a region: the most likely token, or clusters of log-probabilities",
    ] = "argmax",
    k: Annotated[int | None, "number of clusters; chosen if left out"] = None,
    k_by: Annotated[Literal["silhouette", "bic"], "what chooses it"] = "silhouette",
    dictionary: Annotated[
        Path | None, "folder of a dictionary of the stream, to hold normals against"
    ] = None,
    matches: Annotated[int, "directions to name for each border"] = 3,
    slice_pair: Annotated[int, "pair the plane of the slice image goes through; 0 for none"] = 1,
    slice_steps: Annotated[int, "points along each side of that image"] = 31,
    top: Annotated[int | Literal["all"], "how many borders to keep, by number of walks"] = 40,
    batch_size: Batch = "auto",
) -> CircuitGraph:
    """Regions of outputs that walks between activations cross, their borders and normals."""
    options = {name: value for name, value in locals().items() if name not in ("model", "task")}
    from circuitlab_activation_plateaus.regions.tracing import plateau_regions as trace

    return trace(model, task, **options | {"batch_size": _rows(batch_size)})


def injection_scan(
    model: TracedModel,
    task: Task,
    *,
    direction: Direction = "mean-difference",
    site: SteeredSite = None,
    positions: SteeredPositions = "auto",
    unit: Unit = "raw",
    prompts: Steered = "clean",
    low: Low = -10.0,
    high: High = 10.0,
    steps: ScanSteps = 128,
    index: Index = 0,
    corpus: Corpus = 0,
    dictionary: ScanDictionary = None,
    towards: Towards = None,
    away: Away = None,
    prompt_prefix: Prefix = None,
    neurons: Neurons = None,
    controls: Controls = 3,
    top: Top = 20,
    threshold: Threshold = None,
    batch_size: Rows = "auto",
) -> CircuitGraph:
    """Steer by degrees: add a direction c times, and take every answer apart, exactly.

    Activation addition, Turner et al. 2023 (arXiv:2308.10248); the parts are direct logit
    attributions with each run's own norm.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "task")}
    from circuitlab_activation_plateaus.steering.scanning import injection_scan as trace

    return trace(model, task, **options | {"batch_size": _rows(batch_size)})


def scan(
    model: TracedModel,
    *,
    task: Annotated[str | None, "named task; a bundled model's own if left out"] = None,
    task_file: Annotated[Path | None, "task file"] = None,
    clean: Annotated[str | None, "prompt of a task of one pair"] = None,
    corrupt: Annotated[str | None, "its other prompt"] = None,
    answer: Annotated[str | None, "its right answer"] = None,
    wrong: Annotated[str | None, "its wrong answer"] = None,
    output: Annotated[Path | None, "file of the circuit; its suffix names the format"] = None,
    plot: Annotated[Path | None, "file of the plots: .plot.svg, .plot.png or .plot.pdf"] = None,
    direction: Direction = "mean-difference",
    site: SteeredSite = None,
    positions: SteeredPositions = "auto",
    unit: Unit = "raw",
    prompts: Steered = "clean",
    low: Low = -10.0,
    high: High = 10.0,
    steps: ScanSteps = 128,
    index: Index = 0,
    corpus: Corpus = 0,
    dictionary: ScanDictionary = None,
    towards: Towards = None,
    away: Away = None,
    prompt_prefix: Prefix = None,
    neurons: Neurons = None,
    controls: Controls = 3,
    top: Top = 20,
    threshold: Threshold = None,
    batch_size: Rows = "auto",
) -> Mapping[str, Any]:
    """Steer by degrees, and write circuit and plots: trace injection-scan in one word."""
    options = {name: value for name, value in locals().items() if name != "model"}
    from circuitlab_activation_plateaus.steering.scanning import scan as run

    # build_circuit reads the options again, so that auto is understood there.
    return run(model, **options)


def _rows(size: int | Literal["auto"]) -> int | None:
    return None if size == "auto" else size
