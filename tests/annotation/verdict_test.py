"""Verdicts as judges write them, and what must not be taken for one."""

import time

import pytest

from jaxrlhf.annotation.verdict import Reply, read_reply, read_verdict, verdict_pattern

A, B, TIE = 1.0, 0.0, 0.5
VERDICTS = [
    ("Verdict: A", A),
    ("verdict: b.", B),
    ("  **VERDICT:** Tie  ", TIE),
    ("Verdict: [[B]]\n\n", B),
    ("Final verdict: Text A", A),
    ("Verdict: a tie", TIE),
    ("Verdict： A", A),
    ("Verdict: A\nNo, on reflection:\nVerdict: B\nThank you.", B),
    ("The text says 'Verdict: A' of itself.\r\nVerdict: B", B),
    ("Verdict: A or B", None),
    ("Verdict: A/B", None),
    ("Verdict A", None),
    ("Verdict:", None),
    ("My verdict: neither", None),
    ("", None),
    ("Verdict: A is better", A),
    ("Verdict: A (the first text)", A),
    ("**Verdict**\nA", A),
    ("Verdict: \\boxed{A}", A),
    ("Verdict: Text A is better.", A),
    ("I prefer A. Verdict: A", A),
    ("Verdict: tied", TIE),
    ("Verdict: A, since it is kind", A),
    ("**Verdict: A is better**", A),
    ("[[A]]", A),
    ("Winner: B", B),
    ('{"verdict": "A"}', A),
    ('```json\n{"reasoning": "B is rude, so", "verdict": "A"}\n```', A),
    ('{"winner": "B", "why": "A is long"}', B),
    ("<think>Verdict: B</think>\nVerdict: A", A),
    ("hm, Verdict: B\n</think>\n\nVerdict: A", A),
    ("<think>Verdict: B", None),
    ("## Verdict\n\nText B is better.", B),
    ("A", A),
    ("b", B),
    ("Tie", TIE),
    ("**B**", B),
    ("My final verdict is: [[A>>B]]", A),
    ("[[A=B]]", TIE),
    ("[[B>A]]", B),
    ("[[A<B]]", B),
    ("[[C]]", TIE),
    ("Verdict: A is worse", None),
    ("Verdict: A is not better", None),
    ("Verdict: not A", None),
    ("Verdict: A?", None),
    ("Verdict: A, B or tie", None),
    ("I cannot judge this. Verdict: A is what the text says.", None),
    ("Both have merits.", None),
    ("Overall, Text B is better.", B),
    ("I prefer A.", A),
    ("Therefore, B wins.", B),
    ("Verdict: B - a clear winner", B),
    ("Verdict: A, not B", A),
    ("Verdict: A not better", None),
    ("Verdict: A is better than B.", A),
    ("Verdict: A is better in style but B overall", None),
    ("<verdict>B</verdict>", B),
    ("<answer>A</answer>", A),
    ("Verdict = B", B),
    ("Verdict is A", A),
    ("The verdict is that A is better", A),
    ("Verdict: I prefer B", B),
    ("Verdict: It's a tie", TIE),
    ("Verdict: Tie (both are good)", TIE),
    ("Verdict: equally good", TIE),
    ("Verdict: no preference", TIE),
    (
        "<|channel|>analysis<|message|>Verdict: B<|end|><|start|>assistant<|channel|>final<|message|>Verdict: A<|return|>",
        A,
    ),
    ("If A is better I write [[A]], otherwise [[B]].", None),
    ("Preferred text: A", A),
    ("Better: B", B),
    ("Judgement: Tie", TIE),
    ("1. Verdict: A", A),
    ("> Verdict: A", A),
    ("| Verdict | A |", None),
    ("Verdict: A. A is kinder.", A),
    ("Verdict: A. B is rude.", None),
    ("Verdict: A\nVerdict: unclear", None),
    ("Verdict – B", B),
    ("Verdict: “A”", A),
    ("Verdict: 'B'", B),
    ("Verdict:A", A),
    ("VERDICT: TEXT B", B),
    ("Verdict: Assistant A", A),
    ("Verdict: B wins because A lies", B),
    ("Verdict:\n\nA", A),
    ("Verdict: A tie between A and B", TIE),
    ("Verdict: Either A or B", None),
    ("{'verdict': 'tie'}", TIE),
    ('{"verdict": null}', None),
    ('{"verdict": "A or B"}', None),
    ("A is better. B is better.", None),
    ("Answer: A", A),
    ("Verdict: A is the more helpful answer.", A),
    ("Verdict: A is more rude", None),
    ("Verdict: I'd go with B", B),
    ("Verdict: second", B),
    ("Verdict (A/B/tie): B", B),
    ("The better text is A.", A),
    ("Result: tie", TIE),
    ("Verdict: ✅ B", B),
    ("Verdict: A\n\nConfidence: 0.9", A),
    ("The first text is better.", A),
    ("Verdict: B (slightly better)", B),
    ("Verdict: A > B", A),
    ("Verdict: A = B", TIE),
    ("Verdict: Draw", TIE),
    ("<think>\nlong", None),
    ("The winner is B.", B),
    ("**Final Verdict:** **Text B**", B),
    ("Verdict: A\n\n(The end.)", A),
    ("Verdict: $\\boxed{\\text{B}}$", B),
]


@pytest.mark.parametrize(("reply", "label"), VERDICTS)
def test_verdicts_are_read(reply, label):
    assert read_verdict(reply) == label


def mirrored(reply):
    """Returns a reply in which the letters A and B have changed places, where they stand alone."""
    return "".join({"A": "B", "B": "A"}.get(letter, letter) for letter in reply)


# Words that hold a lone capital which is no choice, or a small one which is.
UNMIRRORED = (
    "Verdict: a",
    "verdict: b",
    "Assistant",
    "Answer",
    "Both",
    "VERDICT",
    "A tie",
    "Better",
    "(A/B",
    "second",
    "first",
)
MIRRORED = [
    (reply, label) for reply, label in VERDICTS if reply != "b" and not any(word in reply for word in UNMIRRORED)
]


@pytest.mark.parametrize(("reply", "label"), MIRRORED)
def test_neither_letter_is_favoured(reply, label):
    assert read_verdict(mirrored(reply)) == (None if label is None else 1 - label)


@pytest.mark.parametrize(
    "reply",
    [
        "verdict" + ":" * 300_000 + "A",
        " " * 300_000 + "_" * 300_000,
        "<think>" * 100_000,
        "</think>" * 100_000,
        "[[" * 300_000,
        "Verdict: " * 60_000,
        "\\boxed{" * 100_000,
        "A " * 300_000,
        "so, " * 200_000,
        "<|" * 300_000,
        "\n" * 1_000_000,
        "verdict\n" * 100_000,
        "Verdict: A is " + "much " * 200_000,
        "a " * 20 + "tie " * 200_000,
    ],
    ids=lambda reply: repr(reply[:20]),
)
def test_long_replies_are_read_in_time_linear_in_their_length(reply):
    def seconds(text):
        began = time.process_time()
        read_verdict(text)
        return time.process_time() - began

    # 4 times as long if linear, 16 times if quadratic, on any processor.
    assert seconds(reply) < 8 * max(seconds(reply[: len(reply) // 4]), 0.05)


@pytest.mark.parametrize(
    ("reply", "kind", "label"),
    [
        (Reply("Verdict: A", "stop"), "decided", A),
        (Reply("Verdict: tie"), "tie", TIE),
        (Reply("A", "length"), "decided", A),
        (Reply("Verdict: B", "length"), "decided", B),
        (Reply("Both texts are kind.\nVerdict: B", "length"), "cut_off", None),
        (Reply("", "length"), "cut_off", None),
        (Reply("Verdict: A", "content_filter", refused=True), "refused", None),
        (Reply("Sorry, I won't choose."), "refused", None),
        (Reply("I'm sorry to say that B is rude. Verdict: A"), "decided", A),
        (Reply("Hm."), "not_understood", None),
        (Reply(""), "not_understood", None),
    ],
)
def test_replies_are_told_apart(reply, kind, label):
    assert read_reply(reply) == (label, kind)


@pytest.mark.parametrize(
    ("pattern", "reply", "label"),
    [
        (r"Choice: (\w+)", "Choice: A\nChoice: B", B),
        (r"^(?:The )?(?P<verdict>[AB])$", "The A\nVerdict: B", A),
        (r"better:(A|B|tie)", "BETTER:TIE", TIE),
        (r"Choice: (\w+)", "Verdict: A", None),
        (r"Choice: (\w+)", "Choice: 1", None),
        (r"Choice:(x)?", "Choice:", None),
    ],
)
def test_a_pattern_replaces_the_known_forms(pattern, reply, label):
    assert read_verdict(reply, verdict_pattern(pattern)) == label
