"""Write the table of families.md: every built-in analysis on every family, here and on a host.

The full run: some minutes. It trains and traces small random models of every family on this
machine and on a loopback host, compares all numbers, and writes what was done and what was refused.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "families.md"
#: Between them the page is made, not written.
BEGIN, END = "<!-- table: made by docs/make_families.py -->\n\n", "\n<!-- end of the table -->"

sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    """Run everything and write the page."""
    from family_table import COLUMNS, WORK, Place, assert_same, rows, save
    from loopback_host import SHORT, serving

    from circuitlab.remote import client

    torch.set_num_threads(1)
    for name, value in SHORT.items():
        setattr(client, name, value)
    different = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        models = save(folder)
        (folder / "host").mkdir()
        cells: dict[tuple[str, str], str] = {}
        with serving(models, folder / "host") as host:
            for family, (key, model) in zip(COLUMNS, models.items(), strict=True):
                here = Place.load(model, folder / "here" / family)
                there = Place.load(model, folder / "there" / family, host.url, key)
                for work in WORK:
                    cells[family, work] = here.do(work).cell
                    print(f"{family}, {work}: {cells[family, work]}", flush=True)
                    try:
                        assert_same(there.do(work), here.do(work))
                    except AssertionError as error:
                        different.append(f"{family}, {work}: {error}")
    if different:
        sys.exit("not the same there as here:\n" + "\n".join(different))
    text = PAGE.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n".join(rows(cells)) + "\n" + END + after, "utf-8")


if __name__ == "__main__":
    main()
