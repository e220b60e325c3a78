"""The analysis ``injection-scan`` and the command ``scan``: steer by degrees, see who answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from circuitlab import (
    OptionError,
    Task,
    build_circuit,
    check_cut,
    distinct_rows,
    read_task,
    write_circuit,
)
from circuitlab_activation_plateaus.steering.circuits import Scan, scan_circuit
from circuitlab_activation_plateaus.steering.injecting import inject, readout, slopes
from circuitlab_activation_plateaus.steering.profiles import cluster
from circuitlab_activation_plateaus.steering.prompting import baselines
from circuitlab_activation_plateaus.steering.vectors import (
    Choice,
    Positions,
    Prompts,
    Source,
    Steering,
    placed,
    random_like,
    steering,
)

if TYPE_CHECKING:
    from torch import Tensor

    from circuitlab import CircuitGraph, Tokens, TracedModel
    from circuitlab_activation_plateaus.steering.injecting import Readout


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a scan.

    Attributes:
        direction: Where the vector comes from, see :class:`.steering.vectors.Choice`; so are
            ``index``, ``corpus``, ``dictionary``, ``towards`` and ``away``.
        site: Residual stream, as ``resid_pre.1``; None is that of the dictionary, or the middle.
        positions: Where it is added: ``all`` tokens, the ``last``, or from the first on
            (``front``); ``auto`` is front for act-add, else all.
        unit: ``stream``: coefficient 1 is the mean norm of the stream there; ``raw``: the vector's
            own length.
        prompts: Which prompts of the pairs are steered.
        low: Smallest coefficient.
        high: Largest.
        steps: How many, evenly spaced.
        prompt_prefix: Text put before the prompts, to compare steering with prompting.
        neurons: A layer whose MLP is also taken apart into neurons.
        controls: Random vectors of the same length to compare with.
        top: How many components to keep, neurons among them, by absolute score.
        threshold: Keep those of at least this absolute score; with ``top`` both hold.
        batch_size: Rows, each a prompt with one coefficient, per pass; None chooses by memory.

    Raises:
        OptionError: they make no scan.
    """

    direction: Source = "mean-difference"
    site: str | None = None
    positions: Positions | Literal["auto"] = "auto"
    unit: Literal["stream", "raw"] = "raw"
    prompts: Prompts = "clean"
    low: float = -10.0
    high: float = 10.0
    steps: int = 128
    index: int = 0
    corpus: int = 0
    dictionary: Path | None = None
    towards: str | None = None
    away: str | None = None
    prompt_prefix: str | None = None
    neurons: int | None = None
    controls: int = 3
    top: int | Literal["all"] = 20
    threshold: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_cut(self.top, self.threshold)
        if self.steps < 2:
            raise OptionError(f"--steps {self.steps} makes no curve; give 2 or more")
        if not self.low < self.high:
            raise OptionError(
                f"--low {self.low:g} --high {self.high:g}: nothing lies between; give low < high"
            )
        if self.controls < 1:
            raise OptionError(
                f"--controls {self.controls}: a curve says little without a random one beside it; "
                f"give 1 or more"
            )

    @property
    def coefficients(self) -> Tensor:
        """``[steps]``, float64."""
        return torch.linspace(self.low, self.high, self.steps, dtype=torch.float64)

    @property
    def where(self) -> Positions:
        """The positions that are meant."""
        if self.positions != "auto":
            return self.positions
        return "front" if self.direction == "act-add" else "all"

    @property
    def choice(self) -> Choice:
        """Where the vector comes from."""
        return Choice(
            source=self.direction,
            index=self.index,
            corpus=self.corpus,
            dictionary=self.dictionary,
            towards=self.towards,
            away=self.away,
        )


def injection_scan(model: TracedModel, task: Task, **options: Any) -> CircuitGraph:
    """Add a direction by degrees, and see how each component's part in the answer changes.

    Each row of one batch has a coefficient of its own. Its logit difference is taken apart exactly:
    what each component writes at the last position, along the answers' unembedding, over the scale
    of that row's own final norm. A run whose components do not sum to the model's own logit
    difference is refused.

    Args:
        model: Any traced model.
        task: The task; whatever its metric, the logit difference is scanned.
        **options: Those of :class:`Settings`.

    Returns:
        See :func:`.steering.circuits.scan_circuit`.

    Raises:
        OptionError: an option does not fit.
        TaskError: a prompt cannot be encoded.
        SiteError: the model has no such site or neurons.
        NumericsError: an activation is not finite; smaller coefficients may help.
        QualityError: the components do not sum to the logit difference.
    """
    settings = Settings(**options)
    pairs, seed, where = model.encode(task), torch.initial_seed(), settings.where
    read, size = readout(model, pairs), settings.batch_size
    chosen = steering(
        model,
        pairs,
        settings.choice,
        site=settings.site,
        positions=where,
        unit=settings.unit,
        prompts=settings.prompts,
        batch_size=size,
    )
    unsteered = baselines(
        model,
        pairs,
        read,
        prompts=settings.prompts,
        prefix=settings.prompt_prefix,
        batch_size=size,
    )
    tokens: Tokens = getattr(pairs, settings.prompts)
    added, steps = placed(chosen.vectors, tokens, where), settings.coefficients
    found = inject(
        model, tokens, chosen.site, added, steps, read, neurons=settings.neurons, batch_size=size
    )
    measured = Scan(
        steering=chosen,
        what=read.what,
        injection=found,
        controls=_controls(model, tokens, chosen, settings, read, seed),
        slopes=slopes(model, tokens, chosen.site, added, read, size),
        baselines=unsteered,
        clusters=cluster(found.attributions.mean(-1), seed),
        distinct=distinct_rows(pairs),
        seed=seed,
    )
    return scan_circuit(model, measured, settings)


def scan(
    model: TracedModel,
    *,
    task: str | None = None,
    task_file: Path | None = None,
    clean: str | None = None,
    corrupt: str | None = None,
    answer: str | None = None,
    wrong: str | None = None,
    output: Path | None = None,
    plot: Path | None = None,
    **options: Any,
) -> Mapping[str, Any]:
    """Run ``injection-scan`` and write its circuit and plots.

    Args:
        model: Any traced model.
        task: Name of a task; None is the model's own.
        task_file: File of a task.
        clean: Prompt of a task of one pair.
        corrupt: Its other prompt.
        answer: Its right answer.
        wrong: Its wrong answer.
        output: File of the circuit; its suffix names the format.
        plot: File of the plots, ``.plot.svg``, ``.plot.png`` or ``.plot.pdf``.
        **options: Those of :class:`Settings`.

    Returns:
        What it found by label, and the files written.

    Raises:
        OptionError: a task is given twice or in part, or a file's suffix is not known.
        CircuitLabError: see :func:`circuitlab.build_circuit`.
    """
    pair = {"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": wrong}
    circuit = build_circuit(
        model,
        _task(task, task_file, pair),
        "injection-scan",
        # A scan needs no effect between the prompts of a pair.
        allow_weak=True,
        seed=torch.initial_seed(),
        **options,
    )
    told: dict[str, Any] = {"method": circuit.graph["method"], **circuit.graph["findings"]}
    if warnings := circuit.graph["warnings"]:
        told["warnings"] = warnings
    paths = [path for path in (output, plot) if path is not None]
    for path in paths:
        told.setdefault("warnings", []).extend(write_circuit(circuit, path))
    if paths:
        told["written"] = [str(path) for path in paths]
    return {label: value for label, value in told.items() if value}


def _task(name: str | None, file: Path | None, pair: dict[str, str | None]) -> Task | str | None:
    """The task that is meant."""
    given = [part for part, value in pair.items() if value is not None]
    ways = [name is not None, file is not None, bool(given)]
    if sum(ways) > 1:
        raise OptionError(
            "the task is given twice; give one of --task, --task-file and --clean --corrupt "
            "--answer --wrong"
        )
    if file is not None:
        return read_task(file)
    if not given:
        return name
    clean, corrupt, answer, wrong = pair.values()
    if clean is None or corrupt is None or answer is None or wrong is None:
        missing = " ".join(f"--{part}" for part, value in pair.items() if value is None)
        raise OptionError(f"a pair also needs {missing}; give it")
    return Task.from_pair(clean, corrupt, answer, wrong)


def _controls(
    model: TracedModel,
    tokens: Tokens,
    chosen: Steering,
    settings: Settings,
    read: Readout,
    seed: int,
) -> Tensor:
    """Totals with random vectors of the same length, ``[n, n_coefficients, n_prompts]``."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(1, settings.controls + 1):
        vectors = random_like(chosen.vectors, generator)
        each = inject(
            model,
            tokens,
            chosen.site,
            placed(vectors, tokens, settings.where),
            settings.coefficients,
            read,
            decompose=False,
            batch_size=settings.batch_size,
            said=f"injecting a random vector ({number} of {settings.controls})",
        )
        found.append(each.totals)
    return torch.stack(found)
