"""Names of heads as people write them: ``a1.h0``, ``a1.0``, ``a1.*`` and lists of these."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from circuitlab import OptionError

if TYPE_CHECKING:
    from circuitlab import Wiring

#: Layer and number of a head.
Head = tuple[int, int]

# Six digits are more than any model has, and are read in no time.
_NAME = re.compile(r"a([0-9]{1,6}|\*)\.h?([0-9]{1,6}|\*)")


def head_name(head: Head) -> str:
    """``a1.h0``, the name of its component."""
    return f"a{head[0]}.h{head[1]}"


def all_heads(wiring: Wiring) -> list[Head]:
    """Every head of a model, in the order they run."""
    return [(layer, head) for layer in range(wiring.n_layers) for head in range(wiring.n_heads)]


def parse_heads(text: str, wiring: Wiring) -> list[Head]:
    """The heads that a list such as ``"a1.h0, a2.*"`` names, each once, in the order they run.

    Raises:
        OptionError: a name is no head's, the model has no such head, or the list is empty.
    """
    found: set[Head] = set()
    for piece in text.split(","):
        name = piece.strip()
        match = _NAME.fullmatch(name)
        if match is None:
            raise OptionError(
                f"--heads {text!r}: {name!r} is no head; write a1.h0, or a1.* for a whole layer, "
                f"separated by commas"
            )
        meant = [
            (layer, head)
            for layer, head in all_heads(wiring)
            if match[1] in ("*", str(layer)) and match[2] in ("*", str(head))
        ]
        if not meant:
            raise OptionError(
                f"--heads {text!r}: there is no head {name}; layers run from 0 to "
                f"{wiring.n_layers - 1}, heads from 0 to {wiring.n_heads - 1}"
            )
        found.update(meant)
    return sorted(found)
