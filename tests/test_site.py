"""The documentation can be published as it is: the site is built without a warning, offline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text("utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; building fails on a warning: a page, link or anchor that is not there."""
    folder = tmp_path_factory.mktemp("published")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    """Each page of the documentation is in the navigation and was built, and no script was."""
    listed = re.findall(r"([\w/-]+\.md)", CONFIG.partition("nav:")[2])
    pages = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    pages = [page for page in pages if not page.startswith("examples/")]
    assert sorted(listed) == sorted(pages)
    for page in pages:
        built = page.removesuffix(".md") + "/index.html"
        assert (site / ("index.html" if page == "index.md" else built)).is_file(), page
    assert not list(site.rglob("*.py"))


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures are the site's own: it can be read without a network."""
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\" >]+)", text)
        fetched += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*href=\"?([^\" >]+)", text
        )
        assert [url for url in fetched if url.startswith(("http", "//"))] == [], path


def test_index_names_every_page() -> None:
    """A reader who starts at the index finds every page but the decisions' own."""
    text = (DOCS / "index.md").read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"({page.name}" in text, page.name
