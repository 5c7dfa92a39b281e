"""Progress of long work: a bar on a terminal, plain lines in a log file."""

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

WINDOW = 20
SILENCE = 60.0


@contextlib.contextmanager
def progress(
    title: str, total: int, unit: str = "tokens", *, done: int = 0, console: Console | None = None
) -> Iterator[Callable[..., None]]:
    """Yields `advance(amount=1, **metrics)`, to be called once per step with the number of units that it processed.

    On a terminal a live bar shows title, step, units per second over the last 20 steps, the latest metrics and the time
    left. Elsewhere (a log file, a notebook) a line is printed at the first step, at every tenth of `total`, at the first
    step after 60 s without a line, and at the end; while a step takes longer, a line a minute says for how long. The first
    step, which compiles, is excluded from rates. Times are taken at the calls: read a result of the step first, otherwise
    they are dispatch times. A metric that is an array is read when it is shown; None keeps the previous value.

    Args:
        title: name of the work, such as "sft".
        total: number of steps.
        unit: what `amount` counts.
        done: number of steps taken before, in a resumed run.
        console: where to print; standard output by default.
    """
    console = console or Console()
    meter = _Meter(total, unit, done)
    with contextlib.ExitStack() as stack:
        if console.is_interactive:
            bar = stack.enter_context(Progress(*_columns(), console=console))
            show = _bar_mover(title, meter, bar)
        else:
            printed = {"step": meter.before, "time": meter.began}
            show = _line_printer(title, meter, console, printed)
            stack.callback(show, last=True)
            stack.enter_context(_silence_broken(title, meter, console, printed))

        def advance(amount: float = 1, /, **metrics: Any) -> None:
            meter.add(float(amount), metrics)
            show()

        yield advance


class _Meter:
    """Counts steps and units, and formats rates and times."""

    def __init__(self, total: int, unit: str, before: int):
        self.total, self.unit, self.before, self.done, self.units = total, unit, before, before, 0.0
        self.began, self.first = monotonic(), math.nan
        self.now = self.began
        self.metrics: dict[str, Any] = {}
        # The window starts at the end of the first step, which excludes compilation from the rate.
        self.window: deque[tuple[float, float]] = deque(maxlen=WINDOW + 1)

    def add(self, amount: float, metrics: dict[str, Any]) -> None:
        self.now = monotonic()
        self.done += 1
        self.units += amount
        self.window.append((self.now, self.units))
        if self.done == self.before + 1:
            self.first = self.now
        self.metrics.update({name: value for name, value in metrics.items() if value is not None})

    def rate(self) -> str:
        if len(self.window) < 2 or self.now == self.window[0][0]:
            return ""
        (since, before), (now, units) = self.window[0], self.window[-1]
        return f"{_rate_text((units - before) / (now - since))} {self.unit}/s"

    def latest(self) -> str:
        return "  ".join(f"{name} {number_text(value)}" for name, value in self.metrics.items())

    def time(self) -> str:
        if self.done >= self.total:
            return f"in {duration_text(self.now - self.began)}"
        timed = self.done - self.before - 1
        if timed < 1:
            return ""
        left = (self.total - self.done) * (self.now - self.first) / timed
        return f"{duration_text(left)} left"

    def line(self) -> str:
        return "  ".join(filter(None, [f"{self.done}/{self.total}", self.rate(), self.latest(), self.time()]))


class _Metrics(ProgressColumn):
    """The latest metrics: the only column that a narrow terminal truncates."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["metrics"], no_wrap=True, overflow="ellipsis")


def _columns() -> tuple[ProgressColumn, ...]:
    """Returns the columns of the live bar."""
    # Rich first narrows columns that may wrap: that of the metrics is the only one.
    fixed = Column(no_wrap=True)

    def text(field: str) -> TextColumn:
        return TextColumn(f"{{task.{field}}}", markup=False, table_column=fixed.copy())

    return (
        text("description"),
        BarColumn(bar_width=16, table_column=fixed.copy()),
        MofNCompleteColumn(table_column=fixed.copy()),
        text("fields[rate]"),
        _Metrics(),
        text("fields[time]"),
    )


def _bar_mover(title: str, meter: _Meter, bar: Progress) -> Callable[..., None]:
    """Returns `show()`, which updates the live bar from the meter."""
    task = bar.add_task(title, total=meter.total, rate="", metrics="", time="")

    def show() -> None:
        bar.update(task, completed=meter.done, rate=meter.rate(), metrics=meter.latest(), time=meter.time())

    return show


def _line_printer(title: str, meter: _Meter, console: Console, printed: dict[str, Any]) -> Callable[..., None]:
    """Returns `show(last=False)`, which prints a line if one is due; `printed` has the last one's step and time."""

    def show(last: bool = False) -> None:
        done, before = meter.done, printed["step"]
        tenth = 10 * done // max(meter.total, 1) > 10 * before // max(meter.total, 1)
        due = last or before == meter.before or tenth or meter.now - printed["time"] >= SILENCE
        if done > before and due:
            # Never wrapped: log files are searched by line.
            console.print(f"{title}  {meter.line()}", soft_wrap=True, markup=False, highlight=False)
            printed.update(step=done, time=meter.now)

    return show


@contextlib.contextmanager
def _silence_broken(title: str, meter: _Meter, console: Console, printed: dict[str, Any]) -> Iterator[None]:
    """Within it, every minute without a step or a line gets a line; nothing of the devices is read for it."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SILENCE):
            now = monotonic()
            if now - max(printed["time"], meter.now) >= SILENCE:
                since = "the start" if meter.done == meter.before else "the last step"
                text = f"{title}  {meter.done}/{meter.total}  {duration_text(now - meter.now)} since {since}"
                console.print(text, soft_wrap=True, markup=False, highlight=False)
                printed["time"] = now

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def print_table(console: Console, title: str, rows: dict[str, str]) -> None:
    """Prints a two-column table of names and values."""
    table = Table(title=Text(title, "bold"), title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console.print(table)


def number_text(value: Any) -> str:
    """Returns a float with 4 significant digits ("0.5000"), an integer in full ("12,345"), text unchanged."""
    if isinstance(value, str):
        return value
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return f"{value:,}"
    short = float(f"{value:.4g}")
    return f"{short:,.0f}" if 1e4 <= abs(short) < 1e9 else f"{short:#,.4g}".rstrip(".")


def duration_text(seconds: float) -> str:
    """Returns minutes and seconds, "4:10", with hours if there are any, "1:04:10"."""
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bytes_text(number: float) -> str:
    """Returns a number of bytes in powers of 1000 (not 1024), with 3 significant digits: "2.4 GB"."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB", "PB"))


def count_text(number: float) -> str:
    """Returns a number in powers of 1000, with 3 significant digits: "260 K", "1.24 B"; below 1000 unchanged."""
    return _scaled(number, ("", "K", "M", "B", "T"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    # Round before comparing: 999,900 is "1 M", not "1000 K".
    power = 0
    while abs(float(f"{number:.3g}")) >= 1000 and power + 1 < len(units):
        number, power = number / 1000, power + 1
    text = f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
    return f"{text} {units[power]}".rstrip()


def _rate_text(rate: float) -> str:
    """Returns a rate with 3 significant digits, without an exponent: "12,300", "0.52"."""
    short = float(f"{rate:.3g}")
    return f"{short:,.0f}" if short >= 100 else f"{short:g}"
