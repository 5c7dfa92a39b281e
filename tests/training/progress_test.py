"""The progress bar, the lines of a log file, and number formats."""

import io
import re
import threading
import time

import numpy as np
import pytest
from rich.console import Console

from jaxrlhf.training import progress as module
from jaxrlhf.training.progress import bytes_text, count_text, duration_text, number_text, print_table, progress


class Clock:
    """A clock that advances only when set."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return clock


def log_file(width=80):
    return Console(file=io.StringIO(), width=width, force_terminal=False, force_interactive=False, color_system=None)


def lines(console):
    return console.file.getvalue().splitlines()


def run(clock, seconds, total, console, **keywords):
    with progress("sft", total, console=console, **keywords) as advance:
        for step, pause in enumerate(seconds):
            clock.now += pause
            advance(1000, loss=np.float32(2.31), gold=0.12345 if step == 0 else None)


def test_a_log_file_gets_a_line_per_tenth(clock):
    console = log_file(width=20)
    run(clock, [30.0] + [0.5] * 99, 100, console)
    assert [line.split()[1] for line in lines(console)] == [f"{n}/100" for n in (1, *range(10, 101, 10))]
    assert lines(console)[0] == "sft  1/100  loss 2.310  gold 0.1235"
    assert lines(console)[2] == "sft  20/100  2,000 tokens/s  loss 2.310  gold 0.1235  0:40 left"
    assert lines(console)[-1] == "sft  100/100  2,000 tokens/s  loss 2.310  gold 0.1235  in 1:20"


def test_slow_steps_are_logged_every_minute(clock):
    console = log_file()
    run(clock, [25.0] * 20, 1000, console)
    assert [int(re.findall(r"\d+", line)[0]) for line in lines(console)] == [1, 4, 7, 10, 13, 16, 19, 20]


def test_a_long_step_says_every_minute_that_it_goes_on(monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.05)
    threads, console = threading.active_count(), log_file()
    with progress("sft", 2, console=console, done=0) as advance:
        wait_for(lambda: len(lines(console)) >= 2)
        assert all(re.fullmatch(r"sft  0/2  \d:\d\d since the start", line) for line in lines(console))
        advance()
        before = len(lines(console))
        wait_for(lambda: len(lines(console)) > before)
        assert re.fullmatch(r"sft  1/2  \d:\d\d since the last step", lines(console)[-1])
    # Nothing is printed after it has ended.
    assert threading.active_count() == threads
    with pytest.raises(KeyError), progress("sft", 2, console=log_file()):
        raise KeyError
    assert threading.active_count() == threads


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_rate_is_that_of_the_last_twenty_steps(clock):
    console = log_file()
    run(clock, [60.0] + [1.0] * 40 + [0.1] * 20, 61, console, unit="pairs")
    assert "  10,000 pairs/s  " in lines(console)[-1]
    clock.now, console = 0.0, log_file()
    run(clock, [60.0] + [1.0] * 40 + [0.1] * 19, 60, console)
    assert "  10,000 " not in lines(console)[-1]


def test_work_that_fails_logs_its_last_step(clock):
    console = log_file()
    with pytest.raises(KeyError), progress("[sft]", 100, console=console) as advance:
        for step in range(7):
            clock.now += 1.0
            advance(loss=step)
        raise KeyError
    assert lines(console) == ["[sft]  1/100  loss 0", "[sft]  7/100  1 tokens/s  loss 6  1:33 left"]


def test_zero_steps_and_steps_beyond_the_total_are_allowed(clock):
    console = log_file()
    with progress("none", 0, console=console):
        pass
    assert lines(console) == []
    with progress("more", 1, console=console) as advance:
        advance()
        advance()
    assert lines(console) == ["more  1/1  in 0:00", "more  2/1  in 0:00"]


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_gets_a_bar_that_truncates_metrics_only(clock, monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=width, force_terminal=True, force_interactive=True, color_system=None)
    run(clock, [9.0] + [1.0] * 3, 8, console)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).rstrip().split("\r")[-1].rstrip()  # pyright: ignore
    assert shown.startswith("sft ━") and "4/8 1,000 tokens/s loss 2" in shown and shown.endswith("0:04 left")
    assert ("gold 0.1235" in shown) == (width == 120)
    assert len(shown.splitlines()) == 1 and len(shown) <= width


def test_a_table_shows_texts_verbatim():
    console = log_file()
    print_table(console, "about to train", {"model": "[red]tiny[/red]", "memory": bytes_text(2.4e9)})
    assert [line.split() for line in lines(console)] == [
        ["about", "to", "train"], ["model", "[red]tiny[/red]"], ["memory", "2.4", "GB"],
    ]  # fmt: skip


def test_number_formats():
    assert [bytes_text(n) for n in (0, 999, 1000, 999_600, 2.4e9, 2_432_000_000, 5e18)] == [
        "0 B", "999 B", "1 kB", "1 MB", "2.4 GB", "2.43 GB", "5,000 PB",
    ]  # fmt: skip
    assert [count_text(n) for n in (7, 260_000, 999_400, 999_900, 1_240_000_000, 3.2e15)] == [
        "7", "260 K", "999 K", "1 M", "1.24 B", "3,200 T",
    ]  # fmt: skip
    assert [number_text(v) for v in (0.693147, 2.0, 1234.0, 12345, 12345.6, 9999.9, 1e-5, 1e12, float("nan"), "x")] == [
        "0.6931", "2.000", "1,234", "12,345", "12,350", "10,000", "1.000e-05", "1.000e+12", "nan", "x",
    ]  # fmt: skip
    assert [duration_text(s) for s in (-1, 59.7, 250, 3850)] == ["0:00", "1:00", "4:10", "1:04:10"]
