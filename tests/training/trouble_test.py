"""What goes wrong in a run, through the command: one sentence says what, and the run goes on as if nothing had been."""

import resource
import shutil
import sys
import time
import types

import pytest

from jaxrlhf.commands import align
from jaxrlhf.commands.main import run

SAME = ("policy/model.safetensors", "reward/model.safetensors", "metrics.jsonl")


class Judge(types.ModuleType):
    """A module of annotators whose fourth question meets with some trouble."""

    def __init__(self):
        super().__init__("troubled")
        self.trouble, self.calls = lambda: None, 0

    def prefers(self, prompts, firsts, seconds):
        self.calls += 1
        answer = [float(a.count("sun") > b.count("sun")) for a, b in zip(firsts, seconds, strict=True)]
        return (self.trouble() if self.calls == 4 else None) or answer


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
        steps=5,
        batch_size=4,
        pairs=2,
        max_new_tokens=6,
        evaluations=1,
        evaluation_answers=8,
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


def told(capsys, config):
    """Runs what ends with 2 and one sentence; returns the sentence."""
    with pytest.raises(SystemExit) as caught:
        run(config)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def goes_on(world, judge, whole, name):
    judge.calls = 100
    folder = run(settings(world, name))
    for each in SAME:
        assert (folder / each).read_bytes() == (whole / each).read_bytes(), each


def hang():
    time.sleep(3)


def fail():
    raise RuntimeError("the line is dead")


@pytest.mark.parametrize(
    "trouble, sentence",
    [
        (fail, "the line is dead"),
        (hang, "troubled:prefers"),
        (lambda: [7.0] * 8, "troubled:prefers answered 7"),
    ],
    ids=["raises", "hangs", "garbage"],
)
def test_an_annotator_that_fails_loses_nothing(world, judge, whole, capsys, trouble, sentence, request):
    name = request.node.callspec.id
    judge.calls, judge.trouble = 0, trouble
    assert sentence in told(capsys, settings(world, name, annotator_timeout=1.0))
    goes_on(world, judge, whole, name)


def test_a_folder_of_another_run_is_refused_before_anybody_is_asked(world, judge, whole, capsys):
    labels = (whole / "labels.jsonl").read_bytes()
    judge.calls, judge.trouble = 0, lambda: None
    assert "another run's: its beta" in told(capsys, settings(world, "whole", beta=0.9))
    assert judge.calls == 0 and (whole / "labels.jsonl").read_bytes() == labels


def test_a_full_disk_leaves_the_last_checkpoint_whole(world, judge, whole, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    judge.calls, judge.trouble = 0, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        said = told(capsys, settings(world, "full", checkpoint_steps=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "The disk is full" in said and "--resume" in said, said
    goes_on(world, judge, whole, "full")


def test_data_that_are_gone_are_named_and_may_come_back(world, judge, whole, capsys):
    judge.calls, judge.trouble = 0, fail
    assert "the line is dead" in told(capsys, settings(world, "gone"))
    source, kept = world / "pairs.jsonl", world / "kept.jsonl"
    source.rename(kept)
    shutil.rmtree(world / "prepared")
    assert "There is no file or folder" in told(capsys, settings(world, "gone"))
    kept.rename(source)
    goes_on(world, judge, whole, "gone")
    # Prepared data of which a part is missing are prepared again.
    judge.calls, judge.trouble = 0, fail
    told(capsys, settings(world, "shard"))
    largest = max(
        (path for path in (world / "prepared").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    largest.unlink()
    goes_on(world, judge, whole, "shard")
