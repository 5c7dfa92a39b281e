"""A conversation in the terminal: commands, pipes, what is left out, and where a reply ends."""

import io
import os
import pathlib
import pty
import subprocess
import sys

import pytest

from jaxrlhf.commands import chat, models
from jaxrlhf.commands.main import run
from jaxrlhf.data.records import Message

BASE = pathlib.Path("base")


@pytest.fixture
def talk(here, monkeypatch, capsys):
    """`talk(text, **settings) -> ` the conversation, what was printed, and the errors, for piped lines."""

    def run_lines(text, **settings):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        settings = {"policy": BASE, "max_new_tokens": 4, "temperature": 0.0} | settings
        messages = chat.main(chat.Chat(**settings))
        captured = capsys.readouterr()
        return messages, captured.out, captured.err

    return run_lines


def test_lines_are_answered_until_the_end_or_quit(talk):
    messages, out, err = talk("the day ?\n\ngood day\n/what\n/quit\nnever read\n")
    assert [(message.role, message.content) for message in messages[::2]] == [
        ("user", "the day ?"),
        ("user", "good day"),
    ]
    assert [message.role for message in messages] == ["user", "assistant"] * 2
    assert [line.strip() for line in out.splitlines()] == [message.content for message in messages[1::2]]
    assert "There is no command /what. Commands: /reset begins anew, /quit ends" in err
    again, _, _ = talk("the day ?")  # the last line need not end
    assert again == messages[:2]
    reset, _, _ = talk("sun sun sun\n/reset\nthe day ?\n")
    assert reset == messages[:2]
    assert talk("")[0] == []


def test_the_oldest_turns_are_left_out_and_a_message_alone_may_be_too_long(talk):
    lines = ["the day ?", "good day", "the sun .", "a bad day"]
    messages, _, err = talk("\n".join(lines), max_length=20)
    assert err.count("The two oldest turns are left out") >= 1
    assert messages[-2] == Message("user", "a bad day") and len(messages) < 8
    messages, _, err = talk("the " * 30 + "\nthe day ?\n", max_length=20)
    assert "and 16 fit. The message is left out." in err
    assert messages[0] == Message("user", "the day ?") and len(messages) == 2


def test_settings_are_refused(here, capsys):
    for settings, message in (
        ({"max_new_tokens": 47}, "--max-new-tokens 47 leaves no room for a message: the conversation has 48"),
        ({"max_length": 5, "max_new_tokens": 4}, "leaves no room for a message: the conversation has 5 tokens"),
        ({"system": "be kind"}, "a plain transcript knows the roles user and assistant, not system"),
        ({"top_p": 0.0}, "--top-p must lie in"),
        ({"policy": pathlib.Path("none")}, "none holds no policy model"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(chat.Chat(**{"policy": BASE, "max_new_tokens": 4} | settings))
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_template_is_used_and_takes_a_system_message(lay_out, tmp_path, monkeypatch, capsys):
    prompts = []

    def open_stream(*arguments, **settings):
        def stream(prompt, source):
            prompts.append(prompt)
            yield from b"hi"

        return stream

    directory = lay_out(tmp_path / "model", "lists", "own-line")
    bundle = models.open_bundle(directory)
    monkeypatch.setattr(chat, "open_stream", open_stream)
    monkeypatch.setattr(chat, "decoder", lambda config: None)
    shape = type("Shape", (), {"context_length": 64})()
    conversation = chat.Conversation(
        chat.Chat(policy=directory, system="be kind", max_new_tokens=8), models.Model(shape, {}, bundle, ())
    )
    assert "".join(conversation.reply("you?"))
    assert bundle.tokenizer.decode(prompts[0].tolist(), skip_special_tokens=False).split("\n")[:2] == [
        "system: be kind<end>",
        "<user>: you?<end>",
    ]
    conversation.reset()
    assert conversation.messages == [Message("system", "be kind")]


@pytest.mark.parametrize(
    ("pieces", "end", "text"),
    [
        (["a", "\n\nHum", "an: b"], "\n\nHuman:", "a"),
        (["a\n", "\nHumour", " b"], "\n\nHuman:", "a\n\nHumour b"),
        (["a\n\n"], "\n\nHuman:", "a\n\n"),
        (["a", "b"], "", "ab"),
        ([], "\n\nHuman:", ""),
    ],
)
def test_a_reply_ends_where_the_next_turn_would_begin(pieces, end, text):
    shown = list(chat._until(iter(pieces), end))
    assert "".join(shown) == text
    assert all(shown)


def test_an_interrupt_keeps_what_was_said(here, monkeypatch):
    conversation = chat.Conversation(chat.Chat(policy=BASE, max_new_tokens=4), models.open_model(BASE, "policy"))

    def stream(prompt, source):
        yield 6
        raise KeyboardInterrupt

    conversation._stream = stream
    assert "".join(conversation.reply("the day ?")) == "sun"
    assert conversation.messages == [Message("user", "the day ?"), Message("assistant", "sun")]


@pytest.mark.slow
def test_a_terminal_is_asked_line_by_line(here):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "jaxrlhf.commands.main", "chat", "--policy", "base", "--max-new-tokens", "4"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    shown = b""

    def until(text):
        nonlocal shown
        while text not in shown:
            shown += os.read(master, 1024)
        before, _, shown = shown.partition(text)
        return before

    assert b"/reset begins anew" in until(b"> ")
    os.write(master, b"the day ?\n")
    assert until(b"> ").count(b"\n") >= 2
    os.write(master, b"\x04")  # Ctrl-D
    assert process.wait(timeout=60) == 0
    os.close(master)
