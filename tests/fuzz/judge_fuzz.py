"""Random replies of judges: each is read rightly, or counted as cut off, refused or not understood.

python tests/fuzz/judge_fuzz.py --count 2000 --seed 0
"""

import argparse
import collections
import json
import random
import tempfile
import threading
from pathlib import Path

from jaxrlhf.annotation import Journal, JudgeError, http_judge
from jaxrlhf.annotation.chat import Chat, completion
from jaxrlhf.annotation.verdict import Reply, read_reply, read_verdict

LABELS = {"A": 1.0, "B": 0.0, "tie": 0.5}
STATEMENTS = (
    "Verdict: {}",
    "**Verdict: {}**",
    "**Verdict:** {}",
    "Verdict: **{}**",
    "__Verdict: {}__",
    "## Verdict\n\n{}",
    "**Verdict**\n{}",
    "### Final Verdict: {}",
    "My verdict: {}.",
    "Final verdict — {}",
    "VERDICT: {}",
    "verdict = {}",
    "The verdict is {}.",
    "Verdict：{}",
    "- Verdict: {}",
    "> Verdict: `{}`",
    "[[{}]]",
    "My final verdict is: [[{}]]",
    "Verdict: \\boxed{{{}}}",
    "$\\boxed{{\\text{{{}}}}}$",
    '{{"verdict": "{}"}}',
    '{{"reasons": ["B is, or"], "verdict": "{}"}}',
    '```json\n{{\n  "thoughts": "A, or B?",\n  "verdict": "{}"\n}}\n```',
    "<verdict>{}</verdict>",
    "<answer>{}</answer>",
    "Winner: {}",
    "**Winner:** {}",
    "{}",
    "**{}**",
    "Judgement: {}",
    "Preferred: {}",
    "Decision: {}",
    "Verdict:\t{}\r\n",
    "Having weighed both. Verdict: {}",
    "1. Verdict: {}",
    "Verdict: \u201c{}\u201d",
    "Verdict: '{}'",
    "Verdict: ({})",
)
CHOICES = {
    "A": ("A", "Text A", "text A", "Response A", "Answer A", "A.", "[A]"),
    "B": ("B", "Text B", "text B", "Response B", "Answer B", "B.", "[B]"),
    "tie": ("tie", "Tie", "TIE", "a tie", "Tied", "Draw"),
}
# Behind a statement that ends its line with the choice itself.
TAILS = {
    "A": (
        " is better",
        " is better than B.",
        " (the first text)",
        ", since it is kind",
        " because B is rude",
        " wins",
        ", not B",
    ),
    "B": (
        " is better",
        " is better than A.",
        " (the second text)",
        ", as it is short",
        " because A is rude",
        " wins",
        ", not A",
    ),
    "tie": ("", " (both are kind)", ", since both are kind", " between A and B"),
}
UNREADABLE = (
    "Verdict: A or B",
    "Verdict: A/B/tie",
    "Verdict: A, B or tie",
    "Verdict: neither",
    "Verdict: not A",
    "Verdict: A is worse",
    "Verdict: B is not better",
    "Verdict: A?",
    "Verdict: C",
    "Verdict: 7",
    "Verdict:",
    "Both have merits.",
    "",
    "   \n\n",
    "[[]]",
    "[[A]] or [[B]]",
    '{"verdict": null}',
    '{"verdict": "both"}',
    "A and B are fine.",
    "Verdict: A if it is true, else B",
    "Verdict: maybe A",
    "\x00",
    "\ud800",
    "<think>Verdict: A",
    "Verdict: either A or B",
)
BEFORE = (
    "",
    "A is kind. B is short.\n\n",
    "Both texts answer.\r\n",
    "<think>Verdict: A or B? Verdict: B, Verdict: A</think>\n",
    "<think>\nI could write [[A]] or [[B]].\n</think>",
    "hm, Verdict: B\n</think>\n\n",
    "# Thoughts\n\n* A: 7/10\n* B: 6/10\n\n",
    "Verdict: A\nNo, on reflection:\n",
    "\u65e5\u672c\u8a9e\u3002\n",
    "\U0001f33e\n",
    "x" * 5000 + "\n",
    "| A | B |\n|---|---|\n",
    "<|channel|>analysis<|message|>Verdict: B<|end|><|start|>assistant<|channel|>final<|message|>",
)
AFTER = ("", "\n", "\n\n", "  ", "\r\n\r\n", "<|return|>", "\n```")
WRONG = (
    None,
    True,
    7,
    -1.5,
    "",
    "x",
    [],
    {},
    [None],
    [[]],
    {"content": 3},
    {"message": None},
    [{"message": {}}],
    "\ud800",
)
STRONG = "A is kind. B is short.\n\n"


def reply_with_label(draw: random.Random) -> tuple[str, float]:
    """Returns a reply as a judge may write it, and its label."""
    choice = draw.choice(list(LABELS))
    statement = draw.choice(STATEMENTS)
    words = draw.choice(CHOICES[choice])
    if statement.endswith("erdict: {}") and not words.endswith((".", "]")) and draw.random() < 0.5:
        words += draw.choice(TAILS[choice])
    # Weak forms count only where no verdict was stated before.
    weak = (
        "erdict" not in statement and "ERDICT" not in statement and "[[" not in statement and "boxed" not in statement
    )
    before = draw.choice([text for text in BEFORE if not (weak and text.startswith("Verdict"))])
    return before + statement.format(words) + draw.choice(AFTER), LABELS[choice]


def reply_without_label(draw: random.Random) -> str:
    """Returns a reply whose verdict is missing, denied or left open."""
    return (
        draw.choice(("", STRONG, "<think>Verdict: A</think>")) + draw.choice(UNREADABLE) + draw.choice(("", "\n", "  "))
    )


def noise(draw: random.Random) -> str:
    """Returns pieces of replies in any order, cut and repeated."""
    pieces = [
        *STATEMENTS,
        *UNREADABLE,
        *BEFORE,
        *AFTER,
        *"AB:*_[]{}\\\"'<>|\n",
        "verdict",
        "tie",
        "better",
        "is",
        "not",
        "than",
    ]
    text = "".join(draw.choice(pieces) * draw.choice((1, 1, 1, 2, 40)) for _ in range(draw.randrange(12)))
    begin = draw.randrange(len(text) + 1)
    return text[begin : begin + draw.randrange(len(text) + 1)]


def payload(draw: random.Random, text: str) -> bytes:
    """Returns the body of a chat completion with something wrong in it, or of something else."""
    message = {"role": "assistant", "content": draw.choice([text, None, *WRONG, [{"type": "text", "text": text}]])}
    choice = {"message": message, "finish_reason": draw.choice(["stop", "length", "content_filter", *WRONG])}
    if draw.random() < 0.3:
        message["refusal"] = draw.choice(WRONG)
    for part in (message, choice):
        if draw.random() < 0.2:
            part[draw.choice(list(part))] = draw.choice(WRONG)
    body = draw.choice([{"choices": [choice]}, {"choices": draw.choice(WRONG)}, {"error": {"message": text}}, *WRONG])
    encoded = bytearray(json.dumps(body).encode())
    for _ in range(draw.choice((0, 0, 0, 1, 5))):
        if encoded:
            encoded[draw.randrange(len(encoded))] = draw.randrange(256)
    return bytes(encoded[: draw.choice((len(encoded), draw.randrange(len(encoded) + 1)))])


def check_reading(draw: random.Random) -> str:
    """Reads one reply and checks what was read; returns the kind of reading."""
    form = draw.choice(("labelled", "labelled", "open", "noise", "payload"))
    if form == "labelled":
        text, label = reply_with_label(draw)
        reading = read_reply(Reply(text, draw.choice(("stop", ""))))
        assert reading.label == label, f"{text!r}: read {reading}, said {label}"
    elif form == "open":
        text = reply_without_label(draw)
        reading = read_reply(Reply(text, "stop"))
        assert reading.label is None and reading.kind != "cut_off", f"{text!r}: read {reading}"
        assert read_reply(Reply(text, "length")).kind == "cut_off", text
    elif form == "noise":
        reading = read_reply(Reply(noise(draw), draw.choice(("stop", "length", "")), draw.random() < 0.1))
    else:
        try:
            reading = read_reply(completion(payload(draw, reply_with_label(draw)[0])))
        except ValueError as error:
            assert str(error).startswith("a reply") and "\n" not in str(error)
            return "no chat completion"
    assert (reading.kind == "tie") == (reading.label == 0.5)
    assert (reading.kind == "decided") == (reading.label in (0.0, 1.0))
    return reading.kind


def check_judge(draw: random.Random, folder: Path) -> None:
    """Asks a judge that replies at random; every reply must be counted, and only verdicts kept."""
    said = {}

    def complete(self, client, question, stopping):
        del self, client, stopping
        if draw.random() < 0.01:
            raise JudgeError("The judge went home.")
        with_label = draw.random() < 0.7
        text = reply_with_label(draw)[0] if with_label else reply_without_label(draw)
        said[question] = Reply(text, draw.choice(("stop", "stop", "length")), draw.random() < 0.05)
        return said[question]

    path, original = folder / f"{draw.randrange(10**9)}.sqlite", Chat.complete
    judge = http_judge("http://localhost:1", "m", template="{prompt}|{first}|{second}", journal=path, concurrency=1)
    texts = [str(number) for number in range(20)]
    Chat.complete = complete
    try:
        labels = judge(texts, texts, ["other"] * 20)
        lost = None
    except JudgeError as error:
        labels, lost = None, str(error)
        assert "\n" not in lost and "0 labels" not in lost.replace("20 labels", "")
    finally:
        Chat.complete = original
    verdicts = {question: read_reply(reply).label for question, reply in said.items()}
    read = sum(label is not None for label in verdicts.values())
    assert len(Journal(path)) == read and judge.replies.decided + judge.replies.tie == read
    assert judge.replies.total + (lost is not None and judge.replies.total < len(said)) >= len(said)
    if labels is not None:
        for text, label in zip(texts, labels, strict=True):
            one, other = verdicts[f"{text}|{text}|other"], verdicts[f"{text}|other|{text}"]
            assert label == (None if one is None or other is None else (one + 1 - other) / 2)


def main(count: int, seed: int) -> collections.Counter:
    """Reads `count` replies, and asks a judge once for every 20 of them; returns the numbers of readings by kind.

    Raises:
        AssertionError: a reply was read wrongly; the message quotes it.
    """
    draw, kinds = random.Random(seed), collections.Counter()
    for _ in range(count):
        kinds[check_reading(draw)] += 1
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count // 20):
            check_judge(draw, Path(folder))
    assert threading.active_count() < 50
    assert read_verdict("Verdict: A") == 1.0
    return kinds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(dict(main(arguments.count, arguments.seed)))
