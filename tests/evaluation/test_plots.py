"""The report's pictures: no boxes, whatever the script of the queries."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from jaxsp.evaluation import plots

matplotlib.use("agg")


def query(text: str) -> dict:
    return {"query": text, "split": "held_out", "kl": 0.1, "kl_no_context": 1.0}


@pytest.fixture
def install(tmp_path):
    """Installs a font of this name that has but these characters, as long as the test runs."""
    installed = list(font_manager.fontManager.ttflist)

    def install(name: str, characters: str) -> None:
        write(tmp_path / f"{name}.ttf", name, characters)
        font_manager.fontManager.addfont(tmp_path / f"{name}.ttf")

    yield install
    font_manager.fontManager.ttflist[:] = installed


def write(file: Path, name: str, characters: str) -> None:
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((0, 500))
    pen.lineTo((500, 0))
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "sign"])
    builder.setupCharacterMap(dict.fromkeys(map(ord, characters), "sign"))
    builder.setupGlyf(dict.fromkeys((".notdef", "sign"), pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "sign"), (500, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)


def test_characters_that_no_font_has_are_spelled_out(tmp_path):
    """A warning of matplotlib for a missing glyph would be an error here."""
    assert plots._fonts("How long is the café's cable, σ?") == (["DejaVu Sans"], set())
    _, missing = plots._fonts("aԱ\U0001fffe\ufdd0")
    assert missing == {"\ufdd0", "\U0001fffe"}
    assert plots._label("a\ufdd0 for $5", missing) == r"a\ufdd0 for \$5"
    assert len(plots._label("\ufdd0" * 50, missing)) == 52
    plots.by_query([query("Wo\n\tist \ufdd0\U0001fffe\x1b?"), query("水箱 $x$ दिन")], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_an_installed_font_is_used_for_what_matplotlibs_own_lacks(tmp_path, install):
    install("Aaa", "水")
    assert plots._fonts("a水\ufdd0") == (["DejaVu Sans", "Aaa"], {"\ufdd0"})
    plots.by_query([query("a水")], tmp_path / "a.png")


def test_fonts_of_boxes_and_formulas_are_not_used(install):
    install(".Last Resort", "\ufdd0")
    families, missing = plots._fonts("\ufdd0\ue060")
    assert "\ufdd0" in missing
    assert not any("STIX" in name for name in families)  # matplotlib's own has the other one
