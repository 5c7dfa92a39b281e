"""`jaxrlhf compare`: settings that differ, curves that share their colours, numbers with their intervals."""

import json
import math
import os
import re

import pytest

from jaxrlhf.commands import compare
from jaxrlhf.commands.main import run as run_command
from jaxrlhf.training.run_comparison import (
    Run,
    last_values_table,
    panels_of,
    read_run,
    results_table,
    settings_table,
)


def folder(root, name, *, rows=(), **files):
    path = root / name
    path.mkdir(parents=True)
    for each, value in files.items():
        (path / f"{each}.json").write_text(json.dumps(value))
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_of(name="a", config=None, results=None):
    return Run(name, config, {}, results or {}, [])


@pytest.mark.parametrize(
    ("configs", "rows"),
    [
        ([{"x": 1, "y": 2}, {"x": 1, "y": 2}], []),
        ([{"x": 1, "y": 2}, {"x": 1, "y": 3}], [["y", "2", "3"]]),
        ([{"x": None}, {}], [["x", "none", None]]),
        ([{"x": "1"}, {"x": 1}], [["x", '"1"', "1"]]),
        ([{"x": "none"}, {"x": None}], [["x", '"none"', "null"]]),
        ([{"x": True}, {"x": 1}], [["x", "true", "1"]]),
        # Four digits would show both as one.
        ([{"x": 0.0001}, {"x": 0.00010001}], [["x", "0.0001", "0.00010001"]]),
        ([{"in": {"a": 1, "b": 2}}, {"in": {"a": 1, "b": [2]}}], [["in.b", "2", "[2]"]]),
        ([{"x": 1}, None, {"x": 2}], [["x", "1", None, "2"]]),
        ([{"x": 1}, None], []),
    ],
)
def test_the_settings_that_differ_are_listed(configs, rows):
    table = settings_table([run_of(str(number), config) for number, config in enumerate(configs)])
    assert [list(row) for row in table.rows] == rows


def test_results_have_their_intervals():
    results = {
        "win": 0.5, "win_half_interval": 0.25, "kl": 2.0, "kl_low": 1.0, "kl_high": 3.0,
        "n": 1234, "none": None, "text": "high", "price_low": 1.0, "flag": True, "nan": 1.0, "nan_half_interval": None,
    }  # fmt: skip
    table = results_table([run_of("a", results=results), run_of("b", results={"n": 2})])
    assert table.columns == ["", "a", "b"]
    assert {name: shown for name, shown, _ in table.rows} == {
        "win": "0.5000 ± 0.2500", "kl": "2.000 (1.000 to 3.000)", "n": "1,234", "none": "none", "text": "high",
        "price_low": "1.000", "flag": "True", "nan": "1.000",
    }  # fmt: skip
    assert [row[2] for row in table.rows if row[0] == "n"] == ["2"]


def test_a_metric_has_one_panel_whatever_the_method_and_each_run_its_colour(tmp_path):
    evaluation = {"step": 2, "win_rate": 0.5, "win_rate_half_interval": 0.1, "kl": 0.75, "kl_half_interval": None}
    first = folder(tmp_path, "a", rows=[{"step": 1, "upper_loss": 1.0, "kl": 0.5}, evaluation])
    second = folder(tmp_path, "b", rows=[{"step": 1, "loss": None, "kl": 0.25}, {"step": 2, "loss": 3.0, "kl": 1.0}])
    runs = [read_run(first, "a"), read_run(second, "b")]
    panels = panels_of(runs)
    assert list(panels) == ["held out: win_rate", "held out: kl", "upper_loss", "kl", "loss"]
    assert all(list(lines) == ["a", "b"] for _, _, lines in panels.values())
    assert panels["held out: win_rate"][2] == {"a": ([2], [0.5], [0.4], [0.6]), "b": ([], [])}
    assert panels["kl"][2] == {"a": ([1], [0.5]), "b": ([1, 2], [0.25, 1.0])}
    assert math.isnan(panels["loss"][2]["b"][1][0])
    last = {row[0]: row[1:] for row in last_values_table(runs).rows}
    assert last["held out: win_rate"] == ["0.5000 ± 0.1000 (step 2)", None]
    assert last["kl"] == ["0.5000 (step 1)", "1.000 (step 2)"]


def test_a_study_without_steps_or_config(tmp_path):
    rows = [{"method": "x", "value": 1}, {"method": "y", "value": 2}, {"method": "x", "value": 3}]
    run = read_run(folder(tmp_path, "a", rows=rows, results={"config": {"seed": 1}, "rows": [1], "end": 2}), "a")
    assert run.config == {"seed": 1}
    assert run.results == {"end": 2}
    assert {title: series.steps for title, series in run.series.items()} == {"value (x)": [1, 3], "value (y)": [2]}
    assert run.notes == ["Not shown of a's results.json, as they are lists: rows."]


def test_the_page_stands_alone_with_the_settings_first(tmp_path, capsys):
    names = ["_first", "a$b$ <script>x</script>".replace("/", "|")]
    rows = [{"step": 1, "_loss$": 1.0}, {"step": 2, "_loss$": math.inf}, {"step": 3, "_loss$": 1.7e308}]
    rows.append({"step": 4, "_loss$": -1.7e308})
    paths = [
        folder(tmp_path, name, rows=rows, config={"seed": number}, results={"end": 2.0})
        for number, name in enumerate(names)
    ]
    page = tmp_path / "page.html"
    compare.main(compare.Compare(runs=tuple(paths), output=page))
    text = page.read_text()
    order = [text.index(part) for part in ("Settings that differ", "<img", "Last values", "<h2>Results")]
    assert order == sorted(order)
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert f"{page} compares 2 runs.\n" == capsys.readouterr().out
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([*names, "page.html"])


def test_a_page_of_runs_with_the_same_settings_says_so(tmp_path):
    paths = tuple(folder(tmp_path, name, config={"seed": 1}) for name in ("a", "b"))
    compare.main(compare.Compare(runs=paths, output=tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert "<p>The settings do not differ.</p>" in text
    assert "a has no metrics yet." in text
    assert "<img" not in text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [tmp_path / each for each in ("x/a", "y/a", "z/b")]
    assert list(compare.named(paths)) == [str(paths[0]), str(paths[1]), "b"]


@pytest.mark.parametrize(
    ("runs", "output", "message"),
    [
        (("a",), "p.html", "A comparison needs two runs or more; give their folders."),
        (("a", "c"), "p.html", "There is no folder .*c; give the folders of runs"),
        (("a", "b", "../{}/a"), "p.html", r"The run .*a is given 2 times; give each run once\."),
        (("a", "empty"), "p.html", "empty holds no run: config.json, metrics.jsonl and results.json are missing"),
        (("a", "damaged"), "p.html", r"config\.json is no JSON object; mend it, or move it away"),
        (("a", "b"), "a/metrics.jsonl", r"--output a/metrics\.jsonl must end with \.html"),
        (("a", "b"), "folder.html", r"--output folder\.html is a folder; give the name of a file\."),
        (("a", "b"), "none/p.html", "There is no folder none for the page; create it"),
        (("a", "b"), "gs:/bucket/p.html", "is an address"),
        (tuple(map(str, range(25))), "p.html", "25 runs are given, and curves of more than 24"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, output, message, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        folder(tmp_path, name, config={"seed": 1})
    folder(tmp_path, "damaged", config=[1])
    folder(tmp_path, "empty")
    folder(tmp_path, "folder.html")
    monkeypatch.chdir(tmp_path)
    paths = tuple(tmp_path / each.format(tmp_path.name) for each in runs)
    with pytest.raises(SystemExit) as caught:
        run_command(compare.Compare(runs=paths, output=tmp_path.__class__(output)))
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "damaged", "empty", "folder.html"]
