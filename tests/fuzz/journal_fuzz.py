"""Random damage to journals of labels: what is found was written, or one sentence names the file and nothing is changed.

    python tests/fuzz/journal_fuzz.py --count 2000 --seed 0

Three kinds of files are tried: the journal of paid labels (SQLite), and in JSON lines the labels of whole samples and the
metrics of a run.
"""

import argparse
import collections
import json
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.annotation import Journal, question_key
from jaxrlhf.annotation.journal_file import APPLICATION_ID, _checksum
from jaxrlhf.annotation.label_cache import cached_annotator
from jaxrlhf.base.problem import Sample
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.training.run_folder import RunFolder

LABELS = {
    question_key("judge", str(number), "a", "b"): (1.0, 0.0, 0.5, 0.25, None)[number % 5] for number in range(120)
}
NEW = question_key("judge", "new", "a", "b")
NAMES = (
    "labels.sqlite",
    ":memory:",
    "file:labels",
    "a?mode=ro",
    "a#b%41",
    "lr[1]",
    "new\nline",
    "ü 日",
    "-x",
    "a\\b",
    "*",
    "x\udcff",
)


def flipped(draw: random.Random, content: bytes) -> bytes:
    """Returns the content with some bytes changed."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 8, 100))):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Returns the content cut, changed, overwritten, or something else."""
    begin, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    form = draw.choice(("cut", "flip", "flip", "flip", "zero", "drop", "repeat", "swap", "other"))
    if form == "other":
        return draw.choice(
            (b"", b"\n", b'{"label": 1}\n', b"SQLite format 3\0", b"\0" * 5000, draw.randbytes(3000), b"[" * 9999)
        )
    forms: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[:begin],
        "flip": lambda: flipped(draw, content),
        "zero": lambda: content[:begin] + bytes(end - begin) + content[end:],
        "drop": lambda: content[:begin] + content[end:],
        "repeat": lambda: content[:end] + content[begin:],
        "swap": lambda: content[end:] + content[:end],
    }
    return forms[form]()


SCHEMAS = (
    "DROP TABLE answers",
    "ALTER TABLE answers ADD COLUMN more TEXT",
    "ALTER TABLE answers RENAME COLUMN answer TO label",
    "ALTER TABLE answers RENAME TO old",
    "DROP TABLE answers; CREATE VIEW answers AS SELECT 1 AS key, 2 AS answer, 3 AS seal",
    "DROP TABLE answers; CREATE TABLE answers (key TEXT, answer TEXT)",
    "DROP TABLE answers; CREATE TABLE answers (key, answer, seal)",
    "PRAGMA application_id = 7",
    "PRAGMA application_id = 0",
    "PRAGMA user_version = 99",
    "DELETE FROM answers",
    "UPDATE answers SET answer = 7",
    "UPDATE answers SET answer = 'yes'",
    "UPDATE answers SET seal = NULL",
    "UPDATE answers SET seal = 'text'",
    "UPDATE answers SET answer = 1 - answer",
    "UPDATE answers SET key = key || x'00'",
    "CREATE TABLE more (x)",
    "CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM answers; END",
)
TYPES = (7.0, -1.0, float("inf"), "yes", "1.0", b"1", 10**30)


def alter(draw: random.Random, path: Path) -> None:
    """Changes a journal as another program might: another schema or version, or rows of other types with a valid seal."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        if draw.random() < 0.6:
            connection.executescript(draw.choice(SCHEMAS))
            return
        key, label = draw.choice((b"key", "text", 3)), draw.choice(TYPES)
        seal = _checksum(key, label) if isinstance(key, bytes) else b"12345678"  # pyright: ignore[reportArgumentType]
        label = float(label) if isinstance(label, int) else label
        connection.execute("INSERT INTO answers VALUES (?, ?, ?)", (key, label, seal))
    finally:
        connection.close()


def replace(draw: random.Random, path: Path) -> None:
    """Puts something that is no file in the journal's place, or beside it."""
    form = draw.choice(
        (
            "folder",
            "full folder",
            "dangling",
            "loop",
            "linked folder",
            "log folder",
            "log",
            "shared memory",
            "file above",
        )
    )
    if form in ("log folder", "log", "shared memory"):
        beside = path.with_name(path.name + ("-shm" if form == "shared memory" else "-wal"))
        if form == "log folder":
            beside.mkdir()
        else:
            beside.write_bytes(draw.randbytes(draw.choice((0, 10, 32, 5000))))
        return
    path.unlink()
    if form in ("folder", "full folder"):
        path.mkdir()
        if form == "full folder":
            (path / "x").touch()
    elif form == "file above":
        path.parent.joinpath("blocked").write_text("x")
        path.symlink_to(path.parent / "blocked" / "labels")
    else:
        path.symlink_to({"dangling": path.parent / "none" / "x", "loop": path, "linked folder": path.parent}[form])


def check_journal(draw: random.Random, original: bytes, folder: Path) -> str:
    """Damages a journal and opens it; returns what came of it."""
    path = folder / draw.choice(NAMES)
    path.write_bytes(original)
    form = draw.choice(("damage", "damage", "damage", "alter", "replace"))
    if form == "damage":
        path.write_bytes(damaged(draw, original))
    else:
        {"alter": alter, "replace": replace}[form](draw, path)
    before = path.read_bytes() if path.is_file() else None
    try:
        journal = Journal(path)
        found = journal.find(LABELS)
        assert all(found[key] == LABELS[key] for key in found), "a label is not as it was written"
        assert journal.keep(NEW, 0.75) == 0.75
        journal.close()
        assert Journal(path).find([NEW]) == {NEW: 0.75}
    except ValueError as error:
        message = str(error).replace(str(path), "PATH")
        assert "PATH" in message and "\n" not in message, message
        if before is not None and path.is_file():
            assert path.read_bytes() == before or "cannot be used" in message
        return "refused"
    return "whole" if len(found) == len(LABELS) else "empty" if not found else "part"


def sample(number: int) -> Sample:
    """Returns a sample of two pairs."""
    tokens = jnp.full((1, 2, 2, 3), number)
    nothing = jnp.zeros((1, 2, 2, 1))
    return Sample(
        Prompts(jnp.ones((1, 2), int), jnp.ones((1, 2), bool)),
        Responses(tokens, jnp.ones_like(tokens, bool)),
        *[nothing] * 3,
        jnp.full((1, 2), 0.5),
        jnp.ones(2),
        jnp.asarray(2.0),
    )


SAMPLES = [sample(number) for number in range(6)]
KEY = jax.random.key(0)


def labels_of(number: int) -> np.ndarray:
    """Returns the labels of a sample."""
    return np.array([[[number % 2], [0.5]]], np.float32)


def annotator(path: Path, asked: list[int]) -> Callable[..., np.ndarray]:
    """Returns the annotator of samples with its labels in a file."""

    def annotate(key, sample):
        del key
        asked.append(int(sample.responses.tokens[0, 0, 0, 0]))
        return labels_of(asked[-1])

    return cached_annotator(annotate, path)


def check_cache(draw: random.Random, original: bytes, folder: Path) -> str:
    """Damages labels of samples and asks for them again; they must be those that were given."""
    path, asked = folder / "labels.jsonl", []
    path.write_bytes(damaged(draw, original))
    if draw.random() < 0.05:
        path.unlink()
        path.mkdir()
    annotate = annotator(path, asked)
    for number, each in enumerate(SAMPLES):
        try:
            given = annotate(KEY, each)
        except OSError as error:
            assert path.is_dir() and str(path) in str(error)
            return "refused"
        assert given.dtype == np.float32
        np.testing.assert_array_equal(given, labels_of(number))
    assert len(asked) == len(set(asked))
    return "whole" if not asked else "empty" if len(asked) == len(SAMPLES) else "part"


def check_metrics(draw: random.Random, original: bytes, folder: Path) -> str:
    """Damages a run's metrics and reads them; rows are dictionaries with a step, or the line is named."""
    (folder / "metrics.jsonl").write_bytes(damaged(draw, original))
    run = RunFolder.followed(folder)
    try:
        rows = run.metrics()
    except ValueError as error:
        assert "metrics.jsonl, line " in str(error) and "\n" not in str(error)
        return "refused"
    assert all(isinstance(row, dict) and int(row["step"]) == row["step"] for row in rows)
    return "whole" if len(rows) == 9 else "part" if rows else "empty"


def originals(folder: Path) -> dict[str, bytes]:
    """Returns the contents of whole files."""
    journal = Journal(folder / "whole")
    for key, label in LABELS.items():
        journal.keep(key, label)
    journal.close()
    annotate = annotator(folder / "labels", [])
    for each in SAMPLES:
        annotate(KEY, each)
    metrics = "".join(json.dumps({"step": step, "loss": 1.5, "accuracy": None}) + "\n" for step in range(1, 10))
    assert APPLICATION_ID.to_bytes(4, "big") in (folder / "whole").read_bytes()
    contents = {"journal": (folder / "whole").read_bytes(), "cache": (folder / "labels").read_bytes()}
    return contents | {"metrics": metrics.encode()}


def main(count: int, seed: int) -> collections.Counter:
    """Tries `count` damaged files; returns the numbers of each kind by what came of them.

    Raises:
        AssertionError: a label was found that was not written, or a message does not name its file.
    """
    draw, outcomes = random.Random(seed), collections.Counter()
    checks = {"journal": check_journal, "cache": check_cache, "metrics": check_metrics}
    with tempfile.TemporaryDirectory() as root:
        whole = originals(Path(root))
        for number in range(count):
            kind = draw.choice(("journal", "journal", "journal", "cache", "metrics"))
            folder = Path(root) / "tried"
            folder.mkdir()
            try:
                outcomes[f"{kind} {checks[kind](draw, whole[kind], folder)}"] += 1
            except Exception as error:
                raise AssertionError(f"Input {number} of seed {seed}, a {kind}: {error!r}.") from error
            finally:
                shutil.rmtree(folder)
    assert os.path.isabs(root)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(dict(sorted(main(arguments.count, arguments.seed).items())))
