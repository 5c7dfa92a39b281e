"""The report: one self-contained file, safe whatever a model has written."""

import dataclasses
import html.parser
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf.training.figures import draw_curves
from jaxrlhf.training.report import Samples, Table, as_markdown, as_text, tables_of, write_report

NASTY = "<script>alert('x')</script> & \"quotes\" {{ title }} \ud800 \x00 שלום\n\n  indented"
TABLE = Table(
    "results",
    ("method", "return", "labels", "interval", "note"),
    [("bilevel", jnp.float32(0.51234), 12800, "0.51 ± 0.02", "a"), ("[b]decoupled", np.nan, np.int64(7), None, 3)],
)


class Page(html.parser.HTMLParser):
    """Parses a page into its texts by class and its tags; fails if a tag is left open or closed twice."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.addresses = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in {"meta", "img"}:
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts.append((*self.open[-1], data))

    def of(self, tag, kind=None):
        return [text for name, given, text in self.texts if name == tag and given == kind]


def write(folder, **changes):
    given = {
        "title": "A <study>",
        "summary": "First.\nStill first.\n\nSecond.",
        "tables": [TABLE],
        "figures": [],
        "config": {"rate": 1e-3, "worst": np.inf, "path": pathlib.Path("a") / "b", "of": {print}},
    }
    return write_report(folder, **(given | changes))


def test_everything_is_in_one_file(tmp_path):
    draw_curves(tmp_path / "true_return.png", {"a": ("x", "y", {"one": ([0, 1], [1, 2])})})
    draw_curves(tmp_path / "kl.svg", {"a": ("x", "y", {"one": ([0, 1], [1, 2])})})
    path = write(
        tmp_path,
        figures=["true_return.png", "kl.svg"],
        samples=[
            Samples("samples", rows=[("prompt", ("\nold", NASTY))]),
            Samples("three", "abc", [("p", ("1", "2", ""))]),
        ],
        notes=["A note & more."],
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kl.svg", "report.html", "true_return.png"]
    assert path == tmp_path / "report.html" and path.stat().st_mode == (tmp_path / "kl.svg").stat().st_mode
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.of("h1") == page.of("title") == ["A <study>"]
    assert page.of("p") == ["First.\nStill first.", "Second."]
    assert page.of("li") == ["A note & more."]
    assert [address[:25] for address in page.addresses] == ["data:image/png;base64,iVB", "data:image/svg+xml;base64"]
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.of("div", "text") == ["\nold", NASTY.replace("\ud800", "?"), "1", "2"]
    config = json.loads("".join(page.of("pre")))
    assert config["rate"] == 1e-3 and config["worst"] is None and config["path"] == "a/b"
    (footer,) = page.of("footer")
    assert f"jaxrlhf {jaxrlhf.__version__}, JAX 0" in footer and re.search(r"on \d+ × \w", footer)


def test_a_script_in_a_text_is_escaped(tmp_path):
    text = write(
        tmp_path,
        title=NASTY,
        summary=NASTY,
        tables=[Table(NASTY, [NASTY], [[NASTY]])],
        samples=[Samples(NASTY, [NASTY], [(NASTY, [NASTY])])],
        notes=[NASTY],
        config={NASTY: NASTY},
    ).read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "script" not in Page(text).tags


def test_numbers_are_right_aligned(tmp_path):
    page = Page(write(tmp_path).read_text())
    assert page.of("td", "number") == ["0.5123", "12,800", "0.51 ± 0.02", "nan", "7"]
    assert page.of("th", "number") == ["return", "labels", "interval"]


def test_a_command_prints_the_same_table():
    text = as_text(TABLE)
    assert text.splitlines()[0] == "results" and "\x1b" not in text
    assert "│ [b]decoupled │    nan │      7 │" in text and "│ 0.5123 │ 12,800 │ 0.51 ± 0.02 │" in text
    assert "long" * 100 in as_text(Table("wide", ["a"], [["long" * 100]]))


def test_the_settings_may_be_a_dataclass(tmp_path):
    config = dataclasses.make_dataclass("Config", [("seed", int)])(3)
    assert '"seed": 3' in "".join(Page(write(tmp_path, config=config).read_text()).of("pre"))


def test_bad_input_is_named_and_the_old_report_is_kept(tmp_path):
    old = write(tmp_path).read_bytes()
    (tmp_path / "curves.pdf").write_text("")
    with pytest.raises(ValueError, match=r"figure gone\.png is not in"):
        write(tmp_path, figures=["gone.png"])
    with pytest.raises(ValueError, match=r"curves\.pdf is neither a \.png nor a \.svg"):
        write(tmp_path, figures=["curves.pdf"])
    with pytest.raises(ValueError, match="row bilevel of 'short' has 1 cells for 2 columns"):
        write(tmp_path, tables=[Table("short", ("a", "b"), [("bilevel",)])])
    with pytest.raises(ValueError, match="row 'prompt' of 'texts' has 1 cells for 2 columns"):
        write(tmp_path, samples=[Samples("texts", rows=[("prompt", ("one",))])])
    assert (tmp_path / "report.html").read_bytes() == old and len(list(tmp_path.iterdir())) == 2


def test_markdown_tables_round_trip():
    table = Table("All", ("method", "return"), [("a|b", 1.23456), ("none", None)])
    text = as_markdown(table)
    assert text.splitlines() == [
        "**All**", "", "| method | return |", "|---|---:|", "| a\\|b | 1.235 |", "| none |  |",
    ]  # fmt: skip
    plain = as_markdown(table._replace(rows=[("none", None), ("some", 2.5)]))
    assert tables_of("# All\n\n" + plain) == [Table("All", ["method", "return"], [["none", ""], ["some", "2.500"]])]


def test_tables_are_parsed_from_markdown():
    text = "# All\n\nwords\n\n| method | return |\n|---|---|\n| **ours** | 1.0 ± 0.1 |\n\n"
    text += "## More\n| a |\n|---|\n| `x` |\n| 2 |"
    assert tables_of(text) == [
        Table("All", ["method", "return"], [["ours", "1.0 ± 0.1"]]),
        Table("More", ["a"], [["x"], ["2"]]),
    ]
    assert tables_of("| no | rule |") == []
