"""Style of a page: text that can be read in both themes, colours that all can tell apart."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files

import pytest

from circuitlab import layout

STYLE = files("circuitlab.page").joinpath("assets", "page.css").read_text("utf-8")
Colour = tuple[float, float, float]

#: Linear light as those see it who lack one kind of cone, and as all do (Machado et al. 2009).
SIGHTS = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def theme(name: str) -> dict[str, str]:
    """The colours of a theme, by their names."""
    light, dark = re.findall(r":root(?:\[[^]]*\])? \{(.*?)\}", STYLE, re.DOTALL)[:2]
    found: dict[str, str] = {}
    for block in (light, dark) if name == "dark" else (light,):
        found |= dict(re.findall(r"--([a-z-]+): (#[0-9A-Fa-f]{6})", block))
    return found


def linear(colour: str) -> Colour:
    """Linear light of an sRGB colour, 0 to 1 each."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return red, green, blue


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def contrast(a: str, b: str) -> float:
    """Contrast of two colours, 1 to 21, as WCAG 2 defines it."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def lab(light: Colour) -> Colour:
    """CIELAB of linear sRGB light under D65."""
    red, green, blue = (min(1.0, max(0.0, c)) for c in light)
    xyz = (
        (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
        0.2126 * red + 0.7152 * green + 0.0722 * blue,
        (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089,
    )
    x, y, z = (c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116 for c in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def seen(colour: str, sight: str) -> Colour:
    """A colour in CIELAB, as it is seen."""
    red, green, blue = (
        sum(w * c for w, c in zip(row, linear(colour), strict=True)) for row in SIGHTS[sight]
    )
    return lab((red, green, blue))


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_can_be_read(name: str) -> None:
    """Every colour of text has the contrast of WCAG AA, 4.5, on all it stands on."""
    colours = theme(name)
    for ink, ground in itertools.product(("ink", "soft", "faint"), ("panel", "page", "canvas")):
        assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for ink, ground in (("good", "panel"), ("bad", "panel"), ("end-ink", "end"), ("soft", "hover")):
        assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for ground in ("head", "mlp", "gate", "place", "region"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5, ground


@pytest.mark.parametrize("name", ["light", "dark"])
@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(
    "group", [("helps", "hurts"), ("negative", "positive"), ("a", "b", "both")], ids="-".join
)
def test_lines_can_be_told_apart(name: str, sight: str, group: tuple[str, ...]) -> None:
    """Colours that say different things differ by 20 or more in CIELAB, whoever looks."""
    colours = theme(name)
    for one, other in itertools.combinations(group, 2):
        pairs = zip(seen(colours[one], sight), seen(colours[other], sight), strict=True)
        assert sum((a - b) ** 2 for a, b in pairs) ** 0.5 >= 20, (one, other)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_lines_can_be_seen(name: str) -> None:
    """A line at full strength stands out from the ground, by more than 2 to 1."""
    colours = theme(name)
    lines = (
        "helps",
        "hurts",
        "faint-helps",
        "faint-hurts",
        "negative",
        "positive",
        "a",
        "b",
        "both",
    )
    for line in lines:
        assert contrast(colours[line], colours["canvas"]) > 2, line


def test_light_page_has_the_colours_of_pictures() -> None:
    """A page and a picture of one circuit mean the same by a colour."""
    colours = {key: value.upper() for key, value in theme("light").items()}
    drawn = {
        "helps": layout.HELPS, "hurts": layout.HURTS, "faint-helps": layout.FAINT_HELPS,
        "faint-hurts": layout.FAINT_HURTS, "negative": layout.NEGATIVE,
        "positive": layout.POSITIVE, "neutral": layout.NEUTRAL,
        "a": layout.OWNED["a"][0], "b": layout.OWNED["b"][0], "both": layout.OWNED["both"][0],
    }  # fmt: skip
    assert {key: colours[key] for key in drawn} == {k: v.upper() for k, v in drawn.items()}


def test_script_and_style_name_the_same_colours() -> None:
    """Each colour that the script asks the style for is there, in both themes."""
    script = files("circuitlab.page").joinpath("assets", "canvas.js").read_text("utf-8")
    asked = re.search(r"for \(const name of \[(.*?)\]", script, re.DOTALL)
    assert asked is not None
    names = set(re.findall(r'"([a-z-]+)"', asked[1]))
    assert len(names) > 15
    assert names <= set(theme("light"))
    assert names <= set(theme("dark"))
