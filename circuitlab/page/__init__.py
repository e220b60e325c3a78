"""Page: circuits as one interactive HTML file that opens without a network."""

from __future__ import annotations

from circuitlab.page.document import compose, write_page
from circuitlab.page.fragments import Section, figure
from circuitlab.page.notebook import Frame, frame

#: Suffix of pages, as exporters know it.
SUFFIX = ".html"

__all__ = ["SUFFIX", "Frame", "Section", "compose", "figure", "frame", "write_page"]
