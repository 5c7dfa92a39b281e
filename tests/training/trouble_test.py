"""Failures of a run, through the command: one sentence names the cause, and the run resumes with the same result."""

import logging
import resource
import shutil
import sys
import time
import types

import pytest

from jaxrlhf.commands import align
from jaxrlhf.commands.main import run

SAME = ("policy/model.safetensors", "metrics.jsonl")
# The method that compiles fastest: whatever is carried is restored alike, and `commands/` resumes the others.
METHOD = "online-dpo"


class Judge(types.ModuleType):
    """A module with an annotator one of whose calls fails in some way."""

    def __init__(self):
        super().__init__("troubled")
        self.trouble, self.calls, self.fails_at = lambda: None, 0, 4

    def prefers(self, prompts, firsts, seconds):
        self.calls += 1
        answer = [float(a.count("sun") > b.count("sun")) for a, b in zip(firsts, seconds, strict=True)]
        return (self.trouble() if self.calls == self.fails_at else None) or answer

    def arm(self, trouble, fails_at=4):
        self.trouble, self.calls, self.fails_at = trouble, 0, fails_at


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_world):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "troubled", Judge())
        yield sys.modules["troubled"]


def settings(world, name, **others):
    return align.Align(
        policy=world / "base",
        data=str(world / "pairs.jsonl"),
        annotator="troubled:prefers",
        method=METHOD,
        steps=5,
        batch_size=4,
        pairs=2,
        max_new_tokens=6,
        evaluations=1,
        evaluation_answers=8,
        policy_learning_rate=1e-2,
        warmup=1,
        run=name,
        resume=True,
        data_dir=world / "prepared",
        output=world / "runs",
        **others,
    )


@pytest.fixture(scope="module")
def whole(world, judge):
    return run(settings(world, "whole"))


def error_of(capsys, config):
    """Runs a command that must exit with 2 and one sentence; returns the sentence."""
    with pytest.raises(SystemExit) as caught:
        run(config)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def resumes(world, judge, whole, name):
    judge.calls = 100
    folder = run(settings(world, name))
    for each in SAME:
        assert (folder / each).read_bytes() == (whole / each).read_bytes(), each


def hang():
    time.sleep(3)


def fail():
    raise RuntimeError("the line is dead")


def test_a_failing_annotator_loses_nothing(world, judge, whole, capsys):
    """One run fails in three ways, each time one call further on."""
    for trouble, sentence in (
        (fail, "the line is dead"),
        (hang, "troubled:prefers"),
        (lambda: [7.0] * 8, "troubled:prefers answered 7"),
    ):
        judge.arm(trouble, fails_at=2)
        assert sentence in error_of(capsys, settings(world, "annotator", annotator_timeout=1.0))
    resumes(world, judge, whole, "annotator")


def test_a_folder_of_another_run_is_refused_before_any_label_is_asked_for(world, judge, whole, capsys):
    labels = (whole / "labels.jsonl").read_bytes()
    judge.arm(lambda: None)
    assert "another run's: its beta" in error_of(capsys, settings(world, "whole", beta=0.9))
    assert judge.calls == 0 and (whole / "labels.jsonl").read_bytes() == labels


def test_a_full_disk_leaves_the_last_checkpoint_intact(world, judge, whole, capsys, monkeypatch):
    # The captured standard error may be a file, which then has no room for other libraries' logs either.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    judge.arm(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1])))
    try:
        message = error_of(capsys, settings(world, "full", checkpoint_steps=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "The disk is full" in message and "--resume" in message, message
    resumes(world, judge, whole, "full")


def test_missing_data_are_named_and_the_run_resumes_when_they_are_back(world, judge, whole, capsys):
    judge.arm(fail, fails_at=2)
    assert "the line is dead" in error_of(capsys, settings(world, "gone"))
    source, kept = world / "pairs.jsonl", world / "kept.jsonl"
    source.rename(kept)
    shutil.rmtree(world / "prepared")
    assert "There is no file or folder" in error_of(capsys, settings(world, "gone"))
    kept.rename(source)
    judge.arm(fail, fails_at=2)
    assert "the line is dead" in error_of(capsys, settings(world, "gone"))
    # Prepared data with a missing file are prepared again.
    largest = max(
        (path for path in (world / "prepared").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    largest.unlink()
    resumes(world, judge, whole, "gone")
