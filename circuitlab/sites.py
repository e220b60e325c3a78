"""Site: one place in the forward pass where an activation is read or written."""

from __future__ import annotations

from dataclasses import dataclass

from circuitlab.errors import SiteError

#: Kinds in the order one block runs them. ``embed`` and ``logits`` belong to no block.
BLOCK_KINDS = (
    "resid_pre",
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_post",
    "mlp_out",
    "resid_post",
)
KINDS = ("embed", *BLOCK_KINDS, "logits")
HEAD_KINDS = frozenset({"q", "k", "v", "z", "pattern"})

_SHAPES = {
    "embed": "[batch, pos, d_model]",
    "q": "[batch, pos, n_heads, d_head]",
    "k": "[batch, pos, n_heads, d_head]",
    "v": "[batch, pos, n_heads, d_head]",
    "z": "[batch, pos, n_heads, d_head]",
    "pattern": "[batch, n_heads, query, key]",
    "mlp_post": "[batch, pos, d_mlp]",
    "logits": "[batch, pos, vocab]",
}


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the forward pass; hashable, ordered by execution.

    Kinds, with ``layer`` counted from 0:

    * ``embed``: output of the token embedding, before positions; no layer.
    * ``resid_pre``: residual stream as block ``layer`` reads it; ``resid_pre`` 0 is token plus
      position embedding, ``resid_pre`` 1 comes after block 0.
    * ``q``, ``k``, ``v``: the head's projections, before any rotation; ``z``: pattern-weighted
      values, before the output projection; ``pattern``: attention probabilities.
    * ``attn_out``: what the attention writes, bias included; ``resid_mid``: the stream after it.
    * ``mlp_in``: the stream as the MLP alone reads it. Writing or differentiating here leaves the
      stream that continues beside the MLP untouched.
    * ``mlp_post``: the MLP's hidden layer behind its nonlinearity, as its output projection reads
      it; only where the model's architecture names that projection.
    * ``mlp_out``: what the MLP writes, bias included; ``resid_post``: the stream after the block.
    * ``logits``: no layer; read as ``Run.logits``.

    Attributes:
        kind: One of :data:`KINDS`.
        layer: Block, None for ``embed`` and ``logits``.
        head: One head of a per-head kind; None for all.
        position: One position, negative from the end; None for all.

    Raises:
        SiteError: unknown kind, or a layer or head where there is none.
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(f"site kind {self.kind!r} is unknown; kinds are {', '.join(KINDS)}")
        if (self.layer is None) == (self.kind in BLOCK_KINDS):
            fact = "needs a layer" if self.layer is None else "has no layer"
            raise SiteError(f"site {self.kind!r} {fact}; write {self.example}")
        if self.head is not None and self.kind not in HEAD_KINDS:
            raise SiteError(
                f"site {self.kind!r} has no heads; per-head kinds are "
                f"{', '.join(sorted(HEAD_KINDS))}"
            )
        if self.position is not None and self.kind == "pattern":
            raise SiteError(
                "site 'pattern' has query and key positions; read it whole and index it"
            )

    @property
    def example(self) -> str:
        """How a site of this kind is written in Python."""
        return f"Site({self.kind!r}, 0)" if self.kind in BLOCK_KINDS else f"Site({self.kind!r})"

    @property
    def shape(self) -> str:
        """Shape of the whole site, in words."""
        return _SHAPES.get(self.kind, "[batch, pos, d_model]")

    @property
    def whole(self) -> Site:
        """The same site with every head and position."""
        return Site(self.kind, self.layer)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sort key of execution order."""
        rank = {"embed": -1, "logits": 1 << 30}.get(self.kind, self.layer or 0)
        return (
            rank,
            KINDS.index(self.kind),
            -1 if self.head is None else self.head,
            self.position or 0,
        )

    def __lt__(self, other: Site) -> bool:
        return self.order < other.order

    def __str__(self) -> str:
        text = self.kind if self.layer is None else f"{self.kind}.{self.layer}"
        if self.head is not None:
            text += f".h{self.head}"
        return text if self.position is None else f"{text}[{self.position}]"
