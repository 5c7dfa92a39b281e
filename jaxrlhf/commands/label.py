"""People label pairs on a page of this machine, without any training: `jaxrlhf label`."""

import dataclasses
import json
import pathlib
import sys
import time
from typing import ClassVar, Literal

from rich.console import Console

from jaxrlhf.commands.connect import connect
from jaxrlhf.commands.data import Format, read_all, skipped_lines
from jaxrlhf.commands.flags import check_flags, refuse_unused
from jaxrlhf.commands.label_data import (
    LabelledPair,
    Sampling,
    pairs_of,
    sample_pairs,
    write_labels,
)
from jaxrlhf.commands.models import open_model
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.people import PageConfig, check_page
from jaxrlhf.data.records import DataError
from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.page import Page
from jaxrlhf.labelling.people import describe
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.store import LabelStore
from jaxrlhf.training.preemption import stopping

SAMPLING = ("pairs_per_prompt", "max_new_tokens", "temperature", "top_p", "seed")


@dataclasses.dataclass(frozen=True)
class Label(PageConfig):
    """Serves a page on which people say which of two completions is better; writes TRL's preference format.

    Every label is on disk before the page shows the next pair. The same command goes on where it ended or was killed;
    Ctrl-C ends it. With --policy the pairs are sampled first.
    """

    GROUPS: ClassVar[Groups] = {
        "main settings": ("data", "to", "policy", "people_per_pair", "keep", "connect"),
        "data": ("format", "skip_bad", "data_dir"),
        "sampling, with --policy": SAMPLING,
    }

    data: str = ""
    """Pairs to label (.jsonl, .parquet or .csv): prompt with two completions, or with chosen and rejected. With
    --policy: prompts."""
    to: pathlib.Path = pathlib.Path()
    """The .jsonl file for the labels; the journal, and each person's labels with their notes, are kept beside it."""
    policy: pathlib.Path | None = None
    """Model to sample two completions of each prompt from: a Hugging Face directory, or a run's folder."""
    format: Format = "auto"
    """Format of the data; see `jaxrlhf.data`."""
    skip_bad: bool = False
    """Skips unreadable lines and lists them."""
    keep: Literal["majority", "each"] = "majority"
    """What is written of a pair that several people labelled: the majority's label, or each person's."""
    pairs_per_prompt: int = 1
    """With --policy: pairs of completions for each prompt."""
    max_new_tokens: int = 128
    """With --policy: maximum length of a completion in tokens."""
    temperature: float = 1.0
    """With --policy: sampling temperature."""
    top_p: float = 1.0
    """With --policy: probability mass of nucleus sampling; 1 samples from all tokens."""
    seed: int = 0
    """With --policy: random seed of the completions."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Directory for downloaded data."""
    connect: str | None = None
    """In place of all this: HOST:FOLDER, a run's folder, or HOST:FILE, the labels, on a machine that SSH knows, whose page
    is then reached here; --port is the page's there."""


def main(config: Label) -> pathlib.Path | None:
    """Serves the page until it is stopped; returns the path of the labels, or None after --connect.

    Raises:
        ValueError, DataError: a setting, the data or the model cannot be used; the message says what to change.
    """
    if config.connect is not None:
        _check_connection(config)
        connect(config.connect, config.port)
        return None
    _check(config)
    journal = config.to.with_suffix(".sqlite")
    if config.to.exists() and not journal.exists():
        raise ValueError(f"{config.to} exists and has no journal {journal} beside it; give --to another name.")
    fresh, store = not journal.exists(), LabelStore(journal)
    board = Board("Which answer is better?")
    queue = Queue(store, people_per_pair=config.people_per_pair, repeats=config.repeats)
    # Takes hold of the journal, before anything is written beside it.
    page = Page(queue, board, host=config.host, port=config.port)
    try:
        console = Console()
        pairs = _read_pairs(config, store, console)
        _check_same_pairs(config, queue, pairs)
        queue.add(labelled.pair for labelled in pairs)
        written = _serve(config, page, pairs, console)
    except (ValueError, DataError):
        # A command that cannot be carried out leaves nothing behind, but for pairs that were sampled: they took time.
        page.stop()
        if fresh and not queue.votes() and not _sampled_path(config).exists():
            for path in journal.parent.glob(f"{journal.name}*"):
                path.unlink()
        raise
    finally:
        page.stop()
    for note in [*describe(queue.votes()), f"{written[0]} preferences are in {config.to}; {written[1]} labels in all."]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return config.to


def _check_connection(config: Label) -> None:
    others = [field.name for field in dataclasses.fields(config) if field.name not in ("connect", "port")]
    refuse_unused(config, others, "with --connect, which opens the page of a command that runs elsewhere")
    check_page(config)
    if not config.port:
        raise ValueError("--connect needs the --port of the page there; 0 is none.")


def _check(config: Label) -> None:
    if not config.data or config.to == pathlib.Path():
        raise ValueError("Give --data and --to: what is labelled, and the file for the labels.")
    check_flags(config)
    check_page(config)
    if config.policy is None:
        refuse_unused(config, SAMPLING, "without --policy, which samples the completions")
    for name in ("pairs_per_prompt", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
    if config.policy is not None and config.temperature == 0:
        raise ValueError("--temperature 0 gives the same completion twice; give a positive one.")
    if config.to.suffix != ".jsonl" or config.to.is_dir():
        raise ValueError(f"--to {config.to} must be the name of a .jsonl file.")


def _read_pairs(config: Label, store: LabelStore, console: Console) -> list[LabelledPair]:
    data = config.data
    if config.policy is not None:
        data = str(_sampled(config, store, console))
    form: Format = config.format if config.policy is None else "records"
    records = read_all(data, form=form, skip_bad=config.skip_bad, data_dir=config.data_dir)
    for note in skipped_lines(records):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    pairs = pairs_of(records.records)
    if pairs.equal:
        console.print(f"{pairs.equal} pairs have twice the same completion and are left out.", highlight=False)
    return pairs.pairs


def _sampled(config: Label, store: LabelStore, console: Console) -> pathlib.Path:
    """Returns the file of sampled pairs, which is written once."""
    assert config.policy is not None
    path = _sampled_path(config)
    sampling = Sampling(*(getattr(config, name) for name in SAMPLING))
    wanted = json.dumps(sampling._asdict() | {"policy": str(config.policy), "data": config.data}, sort_keys=True)
    stored = store.fact("sampling", wanted)
    if stored != wanted:
        raise ValueError(
            f"The pairs of {config.to} are sampled with other settings, {stored}; give the same, or --to another name."
        )
    if path.exists():
        console.print(f"The pairs were sampled before and are in {path}.", highlight=False, soft_wrap=True)
        return path
    records = read_all(config.data, form=config.format, skip_bad=config.skip_bad, data_dir=config.data_dir)
    for note in skipped_lines(records):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    model = open_model(config.policy, "policy")
    for note in (*model.notes, *model.bundle.found.notes):
        print(note, file=sys.stderr)
    for note in sample_pairs(path, model, records.records, sampling):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return path


def _sampled_path(config: Label) -> pathlib.Path:
    return config.to.with_suffix(".pairs.jsonl")


def _check_same_pairs(config: Label, queue: Queue, pairs: list[LabelledPair]) -> None:
    known = {labelled.pair.key for labelled in pairs}
    others = {vote.pair for vote in queue.votes()} - known
    if others:
        raise ValueError(
            f"{config.to} has labels of {len(others)} pairs that {config.data} does not hold; give the same --data, or "
            "--to another name."
        )


def _serve(config: Label, page: Page, pairs: list[LabelledPair], console: Console) -> tuple[int, int]:
    """Serves until SIGTERM or Ctrl-C, or returns at once where nothing is left; keeps the file of labels up to date."""
    queue, keys = page.queue, [labelled.pair.key for labelled in pairs]
    counts = queue.counts()
    console.print(f"{counts['pairs']} pairs, {counts['left']} labels to give.", highlight=False)
    with stopping() as stop:
        address = page.start() if counts["left"] else None
        written, known, due = write_labels(config.to, pairs, queue, config.keep), queue.changes, 0.0
        if address is None:
            return written
        console.print("Open this address in a browser; who knows it can label. Ctrl-C ends.", highlight=False)
        console.print(address, markup=False, highlight=False, soft_wrap=True)
        while not stop:
            queue.wait(0.5)
            page.board.doing = "All pairs are labelled. Thank you!" if queue.finished(keys) else ""
            if queue.changes != known and time.monotonic() >= due:
                known, began = queue.changes, time.monotonic()
                written = write_labels(config.to, pairs, queue, config.keep)
                # The file is written whole: a large one less often.
                due = time.monotonic() + max(0.5, 20 * (time.monotonic() - began))
    return write_labels(config.to, pairs, queue, config.keep)
