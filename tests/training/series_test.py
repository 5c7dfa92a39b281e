"""A run's curves, read while it is written, and `jaxrlhf watch`."""

import io
import json
import math
import pathlib

import pytest
from rich.console import Console

from jaxrlhf.commands import watch
from jaxrlhf.commands.main import run as run_command
from jaxrlhf.training.series import Series, block_curve, read_rows, series_of, table_of


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([], ""),
        ([3.0], "▅"),
        ([2.0, 2.0], "▅▅"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([0, math.nan, 7], "▁ █"),
        ([math.nan, math.inf], "  "),
        ([0.0] * 32 + [1.0] * 32, "▁" * 16 + "█" * 16),
        ([-1.7e308, 1.7e308], "▁█"),
        ([1.7e308] * 64 + [0.0] * 64, "█" * 16 + "▁" * 16),
    ],
)
def test_a_curve_in_blocks(values, curve):
    assert block_curve(values) == curve


def test_a_mean_stands_for_values_that_are_closer_than_a_block():
    assert block_curve([0, 2, 1, 1, 7, 7], width=3) == "▁▁█"


def test_series_of_a_run_and_of_a_study():
    rows = [
        {"step": 1, "loss": 2.0, "kl": 0.5},
        {"step": 2, "loss": None, "kl": 0.25},
        {"step": 2, "win_rate": 0.5, "kl": 0.75, "none": None, "list": [1], "flag": True},
    ]
    series, others = series_of(rows)
    assert others == ["flag", "list", "none"]
    assert [(each.name, each.steps) for each in series] == [
        ("loss", [1, 2]),
        ("kl (with loss)", [1, 2]),
        ("win_rate", [2]),
        ("kl (with win_rate)", [2]),
    ]
    assert series[0].values[0] == 2
    assert math.isnan(series[0].values[1])
    study, others = series_of([{"method": "a", "value": 1}, {"method": "b", "value": 2}, {"method": "a", "value": 3}])
    assert study == [Series("a", "value", [1, 3], [1.0, 3.0]), Series("b", "value", [2], [2.0])]
    assert not others
    assert table_of(study, "run").columns[0] == "of"
    assert table_of(study, "run").rows[0] == ["a", "value", "3", "3.000", "1.000", "3.000", "▁█"]
    assert series_of([]) == ([], [])


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_text('{"step": 1}\n{"step":')
    assert read_rows(path) == [{"step": 1}]
    for bad in ("[1]", "{", "", "\x00"):
        path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no row of metrics; mend it"):
            read_rows(path)


def test_watch_prints_a_snapshot(tmp_path, capsys):
    watch.main(watch.Watch(run=tmp_path, once=True))
    assert "has no metrics yet" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1 / n, "x": []}) + "\n" for n in (1, 2))
    )
    watch.main(watch.Watch(run=tmp_path, once=True))
    said = capsys.readouterr().out
    for part in ("loss", "█▁", "2 rows", "No numbers, and not shown: x."):
        assert part in said
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_watch_follows_a_run_until_it_is_interrupted(tmp_path, monkeypatch):
    path, screen = tmp_path / "metrics.jsonl", io.StringIO()
    monkeypatch.setattr(watch, "Console", lambda: Console(file=screen, force_terminal=True, width=100))
    written = iter([111.0, 222.0])

    def sleep(seconds):
        try:
            value = next(written)
        except StopIteration:
            raise KeyboardInterrupt from None
        with path.open("a") as stream:
            stream.write(json.dumps({"step": int(value), "loss": value}) + "\n")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.main(watch.Watch(run=tmp_path))
    said = screen.getvalue()
    assert said.index("no metrics yet") < said.index("1 row,") < said.index("2 rows,")


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(watch.Watch(run=pathlib.Path("none")))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "jaxrlhf: There is no folder none; give the folder of a run, such as runs/mine.\n"
