"""Hand-compiled models: what they compute, the task that shows it, and the edges that do it.

Their weights are written down by a formula (see :mod:`circuitlab.zoo.compiling`), so the true
circuit is known and an analysis can be judged by it.

* ``hand-induction``: a previous-token head (``a0.h0``) and an induction head (``a1.h0``) whose
  attention is saturated: no gradient passes through their queries and keys.
* ``gate-…``: two heads copy the bits ``a`` and ``b`` to the last position, and the MLP turns their
  sum into the gate's value, which is logit("yes") - logit("no"). Inputs are ``off off =``,
  ``off on =``, ``on off =`` and ``on on =``. No sum of two bits lies on a kink of the MLP.

What a gradient at the clean prompt says of one bit, and what patching that bit does:

============ ================ ============= ========================================
gate         clean → corrupt  gradient says patching does
============ ================ ============= ========================================
``gate-and`` on on → off off  -1            -1
``gate-or``  on on → off off   0             0; both bits together -1
``gate-add`` on on → off off  -0.5          -0.5; both bits together -1
``gate-xor`` on off → on on   +1            -1
``gate-jump`` on on → off off  0            -1
============ ================ ============= ========================================

``gate-or``, ``gate-xor`` and ``gate-jump`` turn in ramps so steep that 5 gradients between the
corrupt and the clean prompt say the same: integrated gradients miss the ramp too.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from circuitlab.tasks import PromptPair, Task
from circuitlab.zoo.recipe import N_PAIRS, SPECIAL_WORDS

Edge = tuple[str, str, str]

OFF, ON, END, NO, YES = "off", "on", "=", "no", "yes"
GATE_VOCABULARY: tuple[str, ...] = (*SPECIAL_WORDS, OFF, ON, END, NO, YES)
GATE_POSITIONS = 4
LETTERS = tuple("abcdefghijklmnop")
INDUCTION_VOCABULARY = SPECIAL_WORDS + LETTERS
INDUCTION_POSITIONS = 20


@dataclass(frozen=True)
class Gate:
    """A function of two bits as one layer of ReLUs.

    The value is ``offset + sum(weight * relu(steepness * (a + b - threshold)))``.

    Attributes:
        table: The value for ``(a, b)``.
        neurons: ``(threshold, weight)`` of each ReLU.
        offset: Value where every ReLU is off.
        steepness: Slope of a ReLU's input in ``a + b``.
        silent: Edges of the mechanism that change nothing when patched alone.
    """

    name: str
    description: str
    table: dict[tuple[int, int], float]
    neurons: tuple[tuple[float, float], ...]
    contrasts: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    offset: float = 0.0
    steepness: float = 1.0
    silent: frozenset[Edge] = frozenset()


_BITS = frozenset(
    {
        ("input", "a0.h0", "v"),
        ("input", "a0.h1", "v"),
        ("a0.h0", "m0", ""),
        ("a0.h1", "m0", ""),
    }
)
_GATE_MECHANISM = (
    _BITS
    | {("input", head, port) for head in ("a0.h0", "a0.h1") for port in ("q", "k")}
    | {("m0", "logits", "")}
)
_POSITIONAL = _GATE_MECHANISM - _BITS - {("m0", "logits", "")}


def _table(*values: float) -> dict[tuple[int, int], float]:
    return dict(zip(((0, 0), (0, 1), (1, 0), (1, 1)), values, strict=True))


_ALL_OFF = (((1, 1), (0, 0)),)

# Ramps are 0.0005 wide: multiples of 0.1, where 5 steps from corrupt to clean stand, miss them.
GATES = {
    gate.name: gate
    for gate in (
        # The dip between 0.5 and 1 makes room for slope 1 at both bits on, and none on a kink.
        Gate(
            "gate-and",
            "yes if both bits are on",
            _table(0, 0, 0, 1),
            ((0.5, -1.0), (0.75, 2.0)),
            _ALL_OFF,
        ),
        Gate(
            "gate-or",
            "yes if either bit is on",
            _table(0, 1, 1, 1),
            ((0.37, 1.0), (0.3705, -1.0)),
            _ALL_OFF,
            steepness=2000.0,
            silent=_BITS,
        ),
        Gate(
            "gate-add",
            "half a logit for each bit that is on",
            _table(0, 0.5, 0.5, 1),
            ((-1.0, 0.5),),
            _ALL_OFF,
            offset=-0.5,
        ),
        # The value rises with slope 1 everywhere and falls by 2 in a jump between one bit and two.
        Gate(
            "gate-xor",
            "yes if exactly one bit is on",
            _table(0, 1, 1, 0),
            ((-1.0, 1 / 2000), (1.37, -2.0), (1.3705, 2.0)),
            (((1, 0), (1, 1)), ((0, 1), (1, 1))),
            offset=-1.0,
            steepness=2000.0,
        ),
        Gate(
            "gate-jump",
            "yes, by a sudden jump, if both bits are on",
            _table(0, 0, 0, 1),
            ((1.57, 1.0), (1.5705, -1.0)),
            _ALL_OFF,
            steepness=2000.0,
        ),
    )
}

_INDUCTION_MECHANISM = frozenset(
    {
        ("input", "a0.h0", "q"),
        ("input", "a0.h0", "k"),
        ("input", "a0.h0", "v"),
        ("a0.h0", "a1.h0", "k"),
        ("input", "a1.h0", "q"),
        ("input", "a1.h0", "v"),
        ("a1.h0", "logits", ""),
    }
)
_INDUCTION_EFFECTIVE = frozenset(
    {("input", "a0.h0", "v"), ("a0.h0", "a1.h0", "k"), ("a1.h0", "logits", "")}
)

#: Edges of the mechanism: with zero in all others, no answer to any prompt changes; with zero in
#: any one of these, the answer to some prompt does.
MECHANISMS: dict[str, frozenset[Edge]] = {
    "hand-induction": _INDUCTION_MECHANISM,
    **dict.fromkeys(GATES, _GATE_MECHANISM),
}
#: Edges that alone change the task's metric on some pair when they carry what the corrupt prompt
#: writes. Of the mechanism those are missing that carry positions or words both prompts share, and
#: the bits of ``gate-or``, where either suffices.
EFFECTIVE: dict[str, frozenset[Edge]] = {
    "hand-induction": _INDUCTION_EFFECTIVE,
    **{name: _GATE_MECHANISM - _POSITIONAL - gate.silent for name, gate in GATES.items()},
}


def gate_prompt(bits: tuple[int, int]) -> str:
    """The prompt that gives a gate its two bits."""
    return " ".join([*((OFF, ON)[bit] for bit in bits), END])


def _gate_task(gate: Gate) -> Task:
    pairs = tuple(
        PromptPair(gate_prompt(clean), gate_prompt(corrupt), (YES,), (NO,))
        for clean, corrupt in gate.contrasts
    )
    return Task(gate.name, pairs, description=gate.description)


def _induction_pair(rng: Random) -> PromptPair:
    n = rng.randint(4, 8)
    *segment, stranger = rng.sample(LETTERS, n + 1)
    place = rng.randrange(n - 1)
    wrong = rng.choice([letter for letter in segment if letter not in segment[place : place + 2]])
    broken = [*segment[:place], stranger, *segment[place + 1 :]]
    repeated = segment[: place + 1]
    return PromptPair(
        " ".join(segment + repeated), " ".join(broken + repeated), (segment[place + 1],), (wrong,)
    )


def _induction_task() -> Task:
    rng = Random("hand-induction")  # noqa: S311  # data, not secrets
    pairs: dict[object, PromptPair] = {}
    while len(pairs) < N_PAIRS:
        pair = _induction_pair(rng)
        pairs.setdefault(pair.clean, pair)
    return Task(
        "hand-induction", tuple(pairs.values()), description="complete a repeated series of letters"
    )


TASKS = (_induction_task(), *map(_gate_task, GATES.values()))
