"""What the end of a run needs is tried before its first step; judges that are not understood stop a command."""

import errno
import http.server
import json
import shutil
import threading
from typing import ClassVar

import jax
import numpy as np
import pytest

from jaxrlhf.commands import align, evaluate, reward, stage, supervised
from jaxrlhf.commands.main import run
from jaxrlhf.training import checkpoint
from jaxrlhf.training.run_folder import RunFolder

SHORT = {"data": "pairs.jsonl", "held_out": 0.25, "steps": 2, "batch_size": 8, "max_length": 24, "evaluations": 1}


class Judge(http.server.BaseHTTPRequestHandler):
    reply: tuple[str | None, str] = ("", "stop")
    bodies: ClassVar[list[dict]] = []

    def do_POST(self):
        Judge.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        content, finish = Judge.reply
        body = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Silent."""


@pytest.fixture
def judge(monkeypatch):
    """Returns `(content, finish) -> ` the address of a judge that always replies so."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def replying(content, finish="stop"):
        Judge.reply, Judge.bodies = (content, finish), []
        return f"http://127.0.0.1:{server.server_port}/v1#m"

    yield replying
    server.shutdown()
    server.server_close()


def comparing(tmp_path, annotator, **settings):
    shared = {
        "data": "pairs.jsonl",
        "prompts": 4,
        "max_new_tokens": 4,
        "output": tmp_path,
        "data_dir": tmp_path / "data",
    }
    return evaluate.Evaluate(policy="base", reference="base", annotator=annotator, **shared | settings)


@pytest.mark.parametrize(
    ("content", "finish", "message"),
    [
        (
            "Both have merits.",
            "stop",
            r"none has a verdict \(.*not understood\); one ends: 'Both have merits'\. .*--judge-verdict",
        ),
        (None, "length", r"none has a verdict \(.*cut off.*more than 1024 tokens \(--judge-tokens"),
        ("I'm sorry, but I can't help with that.", "stop", r"none has a verdict \(.*refused.*Ask another judge"),
    ],
)
def test_a_judge_that_is_not_understood_stops_an_evaluation(here, tmp_path, judge, capsys, content, finish, message):
    with pytest.raises(SystemExit) as caught:
        run(comparing(tmp_path, judge(content, finish)))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "nan" not in error and error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


def test_what_a_judge_replied_is_reported(here, tmp_path, judge, report_text, capsys):
    settings = {"judge_tokens": 77, "judge_tokens_name": "max_completion_tokens", "judge_temperature": None}
    folder = evaluate.main(comparing(tmp_path, judge("Choice: A"), judge_verdict="Choice: (A|B)", **settings))
    body = Judge.bodies[0]
    assert body["max_completion_tokens"] == 77 and not {"temperature", "max_tokens"} & body.keys()
    # The first text always wins, so that both orders together are a tie.
    results = json.loads((folder / "results.json").read_text())
    assert (results["win_rate"], results["ties"], results["unlabelled"]) == (0.5, 4, 0)
    for text in (report_text(folder), " ".join(capsys.readouterr().out.split())):
        assert "4 pairs were compared: 4 ties, 0 without a label." in text
        assert "Replies of the judge: 8 verdicts, 0 ties, 0 refused, 0 cut off, 0 not understood" in text


def test_an_alignment_stops_for_a_judge_that_is_not_understood(here, tmp_path, judge, align_settings):
    settings = {
        "policy": "base",
        "data": "pairs.jsonl",
        "held_out": 0.25,
        "output": tmp_path,
        "run": "a",
        "resume": True,
    }
    settings |= align_settings | {"data_dir": tmp_path / "data", "evaluation_answers": 8, "steps": 1}
    settings |= {"method": "online-dpo"}
    address = judge("Hm.")
    with pytest.raises(OSError, match="none has a verdict"):
        align.main(align.Align(annotator=address, **settings))
    assert not (tmp_path / "a" / "policy").exists()
    # The judge mended: the same run goes on, with other settings of the judge.
    judge("Choice: A")
    folder = align.main(align.Align(annotator=address, judge_verdict="Choice: (.)", judge_tokens=9, **settings))
    assert json.loads((folder / "results.json").read_text())["labels"] == 8


def test_annotators_that_give_no_label_at_all_stop_a_command(here, tmp_path, align_settings):
    (here / "mute.py").write_text("def none(prompts, firsts, seconds):\n    return [None] * len(prompts)\n")
    with pytest.raises(ValueError, match=r"None of the 4 pairs has a label.*mute:none gave none"):
        evaluate.main(comparing(tmp_path, "mute:none"))
    with pytest.raises(ValueError, match="mute:none gave no label for any of the first 64 pairs"):
        align.main(
            align.Align(policy="base", data="pairs.jsonl", annotator="mute:none", output=tmp_path, **align_settings)
        )


def failing(message):
    def fail(*arguments, **settings):
        raise ValueError(message)

    return fail


@pytest.mark.parametrize("module", [supervised, reward])
@pytest.mark.parametrize("name", ["save_model", "write_report", "draw_curves"])
def test_what_cannot_be_written_is_known_before_the_first_step(here, tmp_path, monkeypatch, module, name):
    owner = {"save_model": "stage", "write_report": "running", "draw_curves": "curves"}[name]
    monkeypatch.setattr(f"jaxrlhf.commands.{owner}.{name}", failing(f"no {name} here"))
    config = {supervised: supervised.Supervised, reward: reward.Reward}[module]
    with pytest.raises(ValueError, match=f"no {name} here"):
        module.main(config(policy=here / "base", output=tmp_path, run="a", **SHORT))
    assert not (tmp_path / "a" / "metrics.jsonl").exists()
    assert not (tmp_path / "a" / "trial").exists()


@pytest.mark.parametrize("name", ["align.try_saving", "running.write_report", "align_report.draw_curves"])
def test_what_an_alignment_cannot_write_is_known_before_its_first_step(
    here, tmp_path, monkeypatch, align_settings, name
):
    monkeypatch.setattr(f"jaxrlhf.commands.{name}", failing("not here"))
    settings = {"policy": "base", "data": "pairs.jsonl", "held_out": 0.25, "output": tmp_path, "run": "a"}
    with pytest.raises(ValueError, match="not here"):
        align.main(align.Align(score="annotators:score", evaluation_answers=4, **settings, **align_settings))
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


def test_a_model_that_reads_back_otherwise_is_refused(here, tmp_path, monkeypatch):
    original = stage.open_model

    def changed(directory, kind, **settings):
        model = original(directory, kind, **settings)
        return model._replace(params=jax.tree.map(lambda leaf: np.asarray(leaf) + 1, model.params))

    monkeypatch.setattr(stage, "open_model", changed)
    with pytest.raises(ValueError, match="reads back otherwise than it was"):
        supervised.main(supervised.Supervised(policy=here / "base", output=tmp_path, run="a", **SHORT))


def test_an_output_folder_is_opened_before_labels_are_paid_for(here, tmp_path):
    (tmp_path / "file").touch()
    asked = []
    import annotators

    annotators.counted = lambda *texts: asked.append(texts) or [1.0] * len(texts[0])
    with pytest.raises(ValueError, match="give --output a folder"):
        evaluate.main(comparing(tmp_path, "annotators:counted", output=tmp_path / "file"))
    assert not asked


def test_a_best_model_that_cannot_be_read_is_an_error_with_a_way_out(here, tmp_path, monkeypatch):
    settings = {"policy": here / "base", "output": tmp_path, "run": "a[0]", "resume": True, **SHORT}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "best", failing("There is no best checkpoint in x (step 2: damaged)."))
        with pytest.raises(ValueError, match=r"step 2: damaged.*run a\[0\] --resume and without --keep-best"):
            supervised.main(supervised.Supervised(keep_best=1, **settings))
    folder = supervised.main(supervised.Supervised(**settings))
    assert (folder / "policy").is_dir() and not (folder / "best").exists()
    assert (supervised.main(supervised.Supervised(keep_best=1, **settings)) / "best" / "policy").is_dir()


@pytest.mark.parametrize("stage_of", [supervised, reward])
def test_steps_of_a_resumed_run(here, tmp_path, stage_of):
    config = {supervised: supervised.Supervised, reward: reward.Reward}[stage_of]
    settings = {"policy": here / "base", "output": tmp_path, "run": "a", "resume": True}
    stage_of.main(config(**settings, **SHORT))
    # The learning rate's schedule spans the steps, so that another number of them is another run.
    for steps in (1, 4):
        with pytest.raises(ValueError, match=f"its steps is 2, this one's {steps}.*--policy .*a\\."):
            stage_of.main(config(**settings, **SHORT | {"steps": steps}))
        # The folder still says what the run is, so that it may be repeated or resumed by naming it.
        assert json.loads((tmp_path / "a" / "config.json").read_text())["steps"] == 2


def test_an_alignment_goes_on_to_more_steps_but_not_to_fewer(here, tmp_path, align_settings):
    settings = {
        "policy": "base",
        "data": "pairs.jsonl",
        "held_out": 0.25,
        "output": tmp_path,
        "run": "a",
        "resume": True,
    }
    settings |= align_settings | {"score": "annotators:score", "evaluation_answers": 8}
    align.main(align.Align(**settings | {"steps": 1}))
    folder = align.main(align.Align(**settings | {"steps": 2}))
    assert [row["step"] for row in RunFolder.followed(folder).metrics() if "upper_loss" in row] == [1, 2]
    with pytest.raises(ValueError, match="has taken 2 steps already; --steps 1 is fewer"):
        align.main(align.Align(**settings | {"steps": 1}))
    assert json.loads((folder / "config.json").read_text())["steps"] == 2


def test_models_of_different_tokenizers_are_refused(here, tmp_path, trained):
    _, reward_run = trained
    for name, source in (("other", here / "base"), ("other-reward", reward_run / "reward")):
        shutil.copytree(source, tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        path.write_text(path.read_text().replace('"sun"', '"x"').replace('"rain"', '"sun"').replace('"x"', '"rain"'))
    message = r"has another tokenizer than the policy \(the same id is"
    with pytest.raises(ValueError, match=f"--reference {message}"):
        evaluate.main(
            evaluate.Evaluate(
                data="pairs.jsonl", policy=here / "base", reference=tmp_path / "other", score="annotators:score"
            )
        )
    for flag in ("annotator", "reward"):
        settings = {flag: str(tmp_path / "other-reward") if flag == "annotator" else tmp_path / "other-reward"}
        settings |= {} if flag == "annotator" else {"score": "annotators:score"}
        with pytest.raises(ValueError, match=f"--{flag}.* {message}"):
            align.main(align.Align(policy=here / "base", data="pairs.jsonl", **settings))


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    def flock(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ValueError, match=r"cannot be locked \(No locks available\); give --output"):
        RunFolder(tmp_path, "run")
