"""The journal: each label is paid for once and stored as it arrives; damaged files are never overwritten."""

import concurrent.futures
import math
import shutil
import sqlite3
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.annotation import Counts, Journal, journaled, question_key

TEXTS = st.text(st.characters(exclude_categories=()), max_size=4)
QUESTIONS = st.tuples(TEXTS, TEXTS, TEXTS, TEXTS, st.integers(0, 20))
PAIRS = (["p", "q", "r"], ["a", "b", "c"], ["d", "e", "f"])


@settings(max_examples=100, deadline=None)
@given(one=QUESTIONS, other=QUESTIONS)
def test_different_questions_have_different_keys(one, other):
    assert (question_key(*one) == question_key(*other)) == (one == other)


@settings(max_examples=100, deadline=None)
@given(
    text=TEXTS, one=st.lists(st.integers(0, 4), min_size=3, max_size=3), other=st.lists(st.integers(0, 4), min_size=3)
)
def test_field_boundaries_matter(text, one, other):
    def cut(places):
        first, second, third = sorted(places[:3])
        return text[:first], text[first:second], text[second:third], text[third:]

    # The same text, split at different places.
    assert (question_key(*cut(one)) == question_key(*cut(other))) == (cut(one) == cut(other))
    assert question_key("n", "ab", "c", "") != question_key("n", "a", "bc", "")
    assert question_key("n", "p", "a", "b", 1) != question_key("n", "p", "a", "b1", 0)


def by_length(asked):
    def annotate(prompts, firsts, seconds):
        asked.append(list(zip(prompts, firsts, seconds, strict=True)))
        return [float(len(first) > len(second)) for first, second in zip(firsts, seconds, strict=True)]

    return annotate


def test_labels_in_the_journal_are_not_asked_for_again(tmp_path):
    asked = []
    annotate = journaled(by_length(asked), tmp_path / "new" / "labels.sqlite", "people")
    assert annotate(["p", "p"], ["aa", "a"], ["b", "bb"]) == [1.0, 0.0]
    assert annotate(["p", "q"], ["aa", "a"], ["b", "bb"]) == [1.0, 0.0]
    assert asked == [[("p", "aa", "b"), ("p", "a", "bb")], [("q", "a", "bb")]]
    assert annotate.counts == Counts(asked=3, found=1, skipped=0)
    annotate.journal.close()
    again = journaled(by_length(asked), tmp_path / "new" / "labels.sqlite", "people")
    assert again(["q", "p"], ["a", "aa"], ["bb", "b"]) == [0.0, 1.0]
    assert again.counts == Counts(found=2)
    assert again([], [], []) == []
    # Another annotator, or the completions swapped, is another question.
    journaled(by_length(asked), again.journal, "others")(["p"], ["aa"], ["b"])
    again(["p"], ["b"], ["aa"])
    assert len(asked) == 4


def test_a_question_repeated_in_a_call_is_another_draw(tmp_path):
    drawn = iter([1.0, 0.0, 0.5, None])

    def annotate(prompts, firsts, seconds):
        return [next(drawn) for _ in prompts]

    path = tmp_path / "labels.sqlite"
    first = journaled(annotate, path, "people")
    assert first(["p"] * 2, ["a"] * 2, ["b"] * 2) == [1.0, 0.0]
    assert first(["p"] * 3, ["a"] * 3, ["b"] * 3) == [1.0, 0.0, 0.5]
    assert first(["p"], ["a"], ["b"]) == [1.0]
    alike = journaled(annotate, path, "a deterministic judge", independent_repeats=False)
    # None is stored too: it was paid for.
    assert alike(["p"] * 3, ["a"] * 3, ["b"] * 3) == [None] * 3
    assert alike(["p"], ["a"], ["b"]) == [None]
    assert alike.counts == Counts(asked=1, found=3, skipped=1)


def test_labels_before_a_failure_are_kept(tmp_path):
    asked = []

    def one_by_one(prompts, firsts, seconds):
        for index in reversed(range(len(prompts))):
            asked.append(prompts[index])
            if prompts[index] == "p" and len(asked) < 4:
                raise RuntimeError("the annotator went home")
            yield index, 1.0

    annotate = journaled(one_by_one, tmp_path / "labels.sqlite", "people")
    with pytest.raises(RuntimeError, match="went home"):
        annotate(*PAIRS)
    assert (asked, annotate.counts) == (["r", "q", "p"], Counts(asked=2))
    assert annotate.known(*PAIRS) == [False, True, True]
    assert annotate(*PAIRS) == [1.0, 1.0, 1.0]
    assert asked == ["r", "q", "p", "p"]


def test_an_annotator_of_lists_loses_at_most_one_batch(tmp_path):
    def annotate(prompts, firsts, seconds):
        if "r" in prompts:
            raise RuntimeError("the annotator went home")
        return [0.5] * len(prompts)

    annotator = journaled(annotate, tmp_path / "labels.sqlite", "people", batch_size=2)
    with pytest.raises(RuntimeError):
        annotator(*PAIRS)
    assert annotator.known(*PAIRS) == [True, True, False]


def no_more(prompts, firsts, seconds):
    yield 0, 1.0


@pytest.mark.parametrize(
    ("annotate", "message"),
    [
        (lambda *texts: [1.0], "people gave 1 answers to 3 questions"),
        (lambda *texts: None, "people did not give a list of answers but None"),
        (lambda *texts: [1.0, 7, 0.0], "people answered 7; a label is 1, 0, 1/2 or None"),
        (lambda *texts: [1.0, -math.inf, 0.0], "people answered -inf"),
        (lambda *texts: [1.0, "yes", 0.0], "people answered 'yes'"),
        (lambda *texts: iter([1.0, 0.0, 0.0]), r"people gave 1\.0; one by one, each answer is \(index, answer\)"),
        (lambda *texts: iter([(0, 1.0), (0, 1.0)]), "and comes once"),
        (lambda *texts: iter([(3, 1.0)]), "and comes once"),
        (no_more, "people gave 1 answers to 3 questions"),
    ],
)
def test_invalid_labels_raise_one_sentence(annotate, message):
    with pytest.raises(ValueError, match=message):
        journaled(annotate, None, "people")(*PAIRS)


def test_labels_are_plain_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    annotate = journaled(lambda *texts: numpy.array([1, 0.5, numpy.nan], "float32"), tmp_path / "labels", "people")
    assert annotate(*PAIRS) == [1.0, 0.5, None]
    assert annotate(*PAIRS) == [1.0, 0.5, None]


def test_writers_share_a_journal(tmp_path):
    path, keys = tmp_path / "labels.sqlite", [question_key("n", str(number), "a", "b") for number in range(40)]

    def write(label):
        # Opened concurrently too.
        journal = Journal(path)
        return [journal.keep(key, label) for key in keys]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        stored = list(pool.map(write, (0.0, 0.25, 0.5, 1.0)))
    # The first label stays, and every writer gets it back.
    assert all(each == stored[0] for each in stored)
    assert Journal(path).find(keys) == dict(zip(keys, stored[0], strict=True))
    assert len(Journal(path)) == 40


def filled(path, count=200):
    journal = Journal(path)
    keys = [question_key("n", str(number), "a", "b") for number in range(count)]
    for key in keys:
        journal.keep(key, 0.25)
    return journal, keys


def truncated(content):
    return content[: len(content) * 6 // 10]


def overwritten(content):
    return content[:6000] + bytes(6000) + content[12000:]


def changed_label(content):
    return content.replace(struct.pack(">d", 0.25), struct.pack(">d", 0.75), 1)


def no_journal(content):
    return b'{"label": 1}\n'


@pytest.mark.parametrize("damage", [truncated, overwritten, changed_label, no_journal])
def test_a_damaged_file_raises_one_sentence_and_is_left_alone(tmp_path, damage):
    path = tmp_path / "labels.sqlite"
    filled(path)[0].close()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged or none at all") as caught:
        Journal(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == damaged


def test_other_databases_and_folders_are_rejected(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE answers (question TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is a database, but no journal of labels"):
        Journal(path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="cannot be used"):
        Journal(tmp_path)
    with pytest.raises(ValueError, match="cannot be used"):
        Journal(path / "labels.sqlite")
    (tmp_path / "empty").touch()
    assert len(Journal(tmp_path / "empty")) == 0


def test_a_torn_write_loses_nothing_before_it(tmp_path):
    journal, keys = filled(tmp_path / "labels.sqlite", 30)
    # As after a power failure: the file, and a log that ends in the middle of a page.
    for ending in ("", "-wal"):
        shutil.copy(f"{journal.path}{ending}", tmp_path / f"torn.sqlite{ending}")
    log = tmp_path / "torn.sqlite-wal"
    complete = log.read_bytes()
    assert len(complete) > 30 * 4096
    log.write_bytes(complete[:-1000])
    torn = Journal(tmp_path / "torn.sqlite")
    assert list(torn.find(keys)) == keys[:-1]
    torn.keep(keys[-1], 0.0)
    assert list(Journal(tmp_path / "torn.sqlite").find(keys)) == keys


def test_a_closed_journal_says_so(tmp_path):
    journal, keys = filled(tmp_path / "labels.sqlite", 1)
    journal.close()
    with pytest.raises(ValueError, match=r"cannot be used.*closed"):
        journal.keep(keys[0], 1.0)
    assert not (tmp_path / "labels.sqlite-wal").exists()
