"""Verdicts in a judge's replies: which text is better, and if none can be read, why not.

A reply without a verdict is one of three things, which are counted apart: cut off by the limit on tokens, refused, or not
understood.
"""

import re
from typing import Literal, NamedTuple

Kind = Literal["decided", "tie", "refused", "cut_off", "not_understood"]

_TEXT = r"(?:text|answer|response|completion|reply|option|candidate|assistant|model|output)"
_TIE = (
    r"(?:(?:a|an)\s+)?(?:tied?|ties|draw|even|equal(?:ly\s+good|\s+quality)?|no\s+(?:clear\s+)?(?:preference|winner)"
    r"|neither\s+is\s+better|(?:both|they)\s+are\s+(?:equal|tied|the\s+same)(?:ly\s+good)?)"
)
_ORDINAL = rf"(?:first|second)(?:\s+(?:{_TEXT}|one)\b|(?=[\W_]*$))"
_CHOICE = re.compile(
    rf"[\W_]{{0,8}}(?:that\s+)?(?:the\s+|it['’]?s\s+|it\s+is\s+)?(?:(?P<tie>{_TIE})|(?:{_TEXT}[\W_]{{0,4}})?(?P<letter>[ab]|{_ORDINAL}))(?!\w|['’]\w)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_COMPARED = re.compile(rf"\s*(>+|<+|={{1,2}})\s*(?:{_TEXT}\s+)?([ab])[\W_]*", re.IGNORECASE)
_ADVERBS = (
    r"(?:(?:clearly|slightly|much|far|by\s+far|marginally|overall|significantly|somewhat|a\s+bit|a\s+little|strictly|still"
    r"|the|text|one)\s+){0,4}"
)
_GOOD = (
    r"(?:better|best|superior|prefer(?:red|able)|stronger|winner|favou?red|chosen"
    r"|more\s+(?:helpful|accurate|correct|useful|relevant|coherent|concise|informative|complete|harmless|honest|natural))"
)
_PRAISED = re.compile(
    rf"\s*(?:(?:is|was|seems|appears|remains)\s+{_ADVERBS}{_GOOD}|wins|{_GOOD})\b(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_EXPLAINED = re.compile(r"\s*(?:[^\w\s]|(?:because|since|as|for|due|over|by|with|between)\b)", re.IGNORECASE)
_DOUBT = re.compile(r"\b(?:but|however|although|though|whereas|unless|if|or)\b|\?", re.IGNORECASE)
_OTHER = re.compile(rf"[\W_]*(?:(not)\s+)?(?:{_TEXT}\s+)?(a|b|tie|draw)\b", re.IGNORECASE)

_OPENING = r"(?:(?:so|therefore|thus|hence|overall|in\s+conclusion|in\s+summary|finally),?\s+)?"
_SPOKEN = r"(?:(?:i|we)(?:['’](?:d|ll))?\s+(?:would\s+)?(?:choose|prefer|pick|favou?r|select|go\s+with|vote\s+for)\s+)?"
_BEFORE = (
    rf"(?:^|(?<=[.!?;])\s|(?<=[{{,]))[\W_]{{0,8}}(?:\d{{1,2}}[.)]\s*)?{_OPENING}"
    r"(?:(?:my|the|our|final|overall)[\s_]+){0,3}"
)
_AFTER = r"(?:\s*\([^()]{0,40}\))?[\"'’\s)\]]{0,4}(?:[:：=]|->|→|-|–|—|\bis\b)"
_WEAK = (
    rf"(?:winner|winning\s+{_TEXT}|decision|result|outcome|selection|pick|preference|judge?ment|choice|conclusion|answer"
    rf"|(?:better|best|preferred|chosen)(?:\s+{_TEXT})?)"
)
# Each matches up to where a statement's value begins; bounded repetitions keep a line of a million colons cheap.
_STATEMENTS = [re.compile(f"{_BEFORE}{key}{_AFTER}", re.IGNORECASE) for key in ("verdict", _WEAK)]
_HEADINGS = [re.compile(rf"{_BEFORE}{key}[\W_]{{0,8}}", re.IGNORECASE) for key in ("verdict", _WEAK)]
_BOXES = re.compile(
    r"\[\[([^\[\]]{1,40})\]\]|\\boxed\s*\{([^{}]{1,40})\}|<(?:verdict|winner|answer|choice)>([^<>]{1,80})</",
    re.IGNORECASE,
)
_LATEX = re.compile(r"\\(?:text|textbf|mathbf|mathrm)\s*\{([^{}]{0,40})\}")
_MARKUP = re.compile(r"[*`#~$]+|(?<!\w)_+|_+(?!\w)")
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>")
_OPENED, _CLOSED = (
    re.compile(f"<{slash}(?:think|thinking|thought|reasoning|analysis|scratchpad)>", re.IGNORECASE)
    for slash in ("", "/")
)
_REFUSAL = re.compile(
    r"[\W_]*(?:(?:i['’]?m|i\s+am)\s+(?:very\s+)?(?:sorry|afraid|unable|not\s+able)|sorry\b|i\s+(?:can(?:not|['’]?t|\s+not)"
    r"|won['’]?t|must\s+decline|have\s+to\s+decline|decline)|as\s+an\s+ai\b)",
    re.IGNORECASE,
)
_LONGEST = 2000
"""Letters of a line that are read, at either end."""


class Reply(NamedTuple):
    """A chat model's reply.

    Attributes:
        text: what it said; empty where it said nothing.
        finish: why it ended, as the server says: "stop", "length", ...; empty where the server does not say.
        refused: whether the server marks it as a refusal, or filtered it.
    """

    text: str
    finish: str = ""
    refused: bool = False


class Reading(NamedTuple):
    """What was read in a reply: a label for a verdict or a tie, None otherwise."""

    label: float | None
    kind: Kind


class Replies(NamedTuple):
    """Numbers of questions by what their last reply was.

    Attributes:
        decided: one of the two texts is better.
        tie: neither is.
        refused: the judge, or a filter in front of it, would not say.
        cut_off: the reply ended at the limit on tokens, before its verdict.
        not_understood: a reply in which no verdict could be read.
        example: the end of a reply without a verdict, for messages.
    """

    decided: int = 0
    tie: int = 0
    refused: int = 0
    cut_off: int = 0
    not_understood: int = 0
    example: str = ""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self[:-1])

    @property
    def lost(self) -> int:
        """Those without a verdict."""
        return self.refused + self.cut_off + self.not_understood

    def add(self, kind: Kind, example: str = "") -> "Replies":
        """Returns the counts with one more."""
        return self._replace(**{kind: getattr(self, kind) + 1}, example=self.example or example)

    def describe(self) -> str:
        """Returns the counts in words."""
        names = {"decided": "verdicts", "tie": "ties", "refused": "refused", "cut_off": "cut off"}
        names |= {"not_understood": "not understood"}
        return ", ".join(f"{getattr(self, field)} {name}" for field, name in names.items())


def read_reply(reply: Reply, pattern: re.Pattern[str] | None = None) -> Reading:
    """Returns what a reply says.

    Args:
        reply: of the judge.
        pattern: where a verdict stands, in place of the forms of `read_verdict`; see `verdict_pattern`.
    """
    if reply.refused:
        return Reading(None, "refused")
    label = read_verdict(reply.text, pattern)
    # Part of a longer reply may quote the verdicts to choose from; "A" alone is all that some judges may write.
    if reply.finish == "length" and not (label is not None and len(reply.text.strip()) <= 16):
        return Reading(None, "cut_off")
    if label is not None:
        return Reading(label, "tie" if label == 0.5 else "decided")
    return Reading(None, "refused" if _REFUSAL.match(reply.text) else "not_understood")


def read_verdict(reply: str, pattern: re.Pattern[str] | None = None) -> float | None:
    r"""Returns 1, 0 or 1/2 for A, B or a tie, as the last verdict in a reply says; None where none can be read.

    Read are `Verdict: A`, in any markup, with an explanation behind it or in a heading's next line; `[[A]]`,
    `\boxed{A}` and `<verdict>A</verdict>`; the key "verdict" of a JSON object; and, in replies without any of these,
    `Winner: A` and its like, or a last line such as `A` or `Text A is better.` What a model thinks first, between
    `<think>` and `</think>`, is left out. A verdict that is denied, doubted or followed by another choice is not read.

    Args:
        reply: the text.
        pattern: of `verdict_pattern`; its last match counts, and none of the forms above.

    Examples:
        >>> from jaxrlhf.annotation import read_verdict
        >>> read_verdict("The first one names its source. Verdict: A"), read_verdict("They are equally good: [[tie]]")
        (1.0, 0.5)
        >>> read_verdict("I cannot judge this.") is None
        True
    """
    text = _without_reasoning(reply)
    if pattern is not None:
        matches = [match[match.re.groupindex.get("verdict", 1)] for match in pattern.finditer(text)]
        return _value(matches[-1] or "") if matches else None
    lines = [line for line in map(_plain, text.splitlines()) if line.strip()]
    for statement, heading, boxed in zip(_STATEMENTS, _HEADINGS, (True, False), strict=True):
        for number in reversed(range(len(lines))):
            values = _values(lines[number], statement, boxed=boxed)
            if not values and number + 1 < len(lines) and heading.fullmatch(lines[number]):
                values = {_value(lines[number + 1])} - ({None} if boxed else set())
            if values:
                return values.pop() if len(values) == 1 else None
    return _last_line(lines[-1]) if lines else None


def verdict_pattern(text: str) -> re.Pattern[str]:
    """Returns the regular expression of a verdict, whose group `verdict`, or else its first, holds A, B or tie.

    Raises:
        ValueError: it is no regular expression, or has no group.
    """
    try:
        pattern = re.compile(text, re.IGNORECASE | re.MULTILINE)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"The pattern of a verdict {text!r} is no regular expression ({error}).") from None
    if not pattern.groups:
        raise ValueError(
            f"The pattern of a verdict {text!r} needs a group around A, B or tie, such as 'Choice: (A|B)'."
        )
    return pattern


def _without_reasoning(reply: str) -> str:
    """Returns what stands behind the last closing tag and before an opening one; a template may write the opening tag."""
    opened = _OPENED.search(reply)
    before = reply[: opened.start()] if opened else reply
    after = _CLOSED.split(reply)[-1]
    if len(after) < len(reply):
        opened = _OPENED.search(after)
        after = after[: opened.start()] if opened else after
        before = after if after.strip() else before
    # Channels of a reply, of which the last is the answer.
    return _SPECIAL.sub("\n", before.rpartition("<|message|>")[2])


def _plain(line: str) -> str:
    """Returns a line without markup; of a long one its two ends."""
    if len(line) > 2 * _LONGEST:
        line = f"{line[:_LONGEST]} {line[-_LONGEST:]}"
    return _MARKUP.sub("", _LATEX.sub(r"\1", line))


def _values(line: str, statement: re.Pattern[str], *, boxed: bool) -> set[float | None]:
    """Returns the values of a line's last statement and of its boxes; None for one that cannot be read."""
    statements = list(statement.finditer(line))
    if statements:
        rest = line[statements[-1].end() :]
        return {_value(rest)} if rest.strip(" \t*_:") else set()
    boxes = [next(group for group in match.groups() if group is not None) for match in _BOXES.finditer(line)]
    return {0.5 if box.strip().upper() == "C" else _value(box) for box in boxes} - {None} if boxed else set()


def _value(text: str) -> float | None:
    """Returns the label of a verdict's words, such as "A", "text B is better" or "a tie (both are short)"."""
    text = re.sub(r"\\boxed\s*\{([^{}]{0,40})\}", r"\1", _LATEX.sub(r"\1", text[:_LONGEST]))
    found = _CHOICE.fullmatch(re.sub(rf"^[\W_]{{0,8}}{_SPOKEN}", "", text, flags=re.IGNORECASE))
    if not found:
        return None
    rest, letter = found["rest"], (found["letter"] or "").lower()
    letter = {"first": "a", "second": "b"}.get(letter.partition(" ")[0], letter)
    label = {"a": 1.0, "b": 0.0}.get(letter, 0.5)
    compared = _COMPARED.fullmatch(rest)
    if letter and compared:
        if compared[2].lower() == letter:
            return None
        return {">": label, "<": 1.0 - label}.get(compared[1][0], 0.5)
    if not rest.strip(" \t\r\n.,;:!*_'\"’”()[]{}<>/\\|-–—"):
        return label
    praised = _PRAISED.match(rest) if letter else None
    if praised:
        return None if _DOUBT.search(praised["rest"]) else label
    return label if _EXPLAINED.match(rest) and _agrees(rest, letter) else None


def _agrees(rest: str, letter: str) -> bool:
    """Returns whether what follows a choice explains it, and does not go on with another choice or a doubt."""
    first = rest.strip(" \t\r\n.,;:!*_'\"’”()[]{}<>-–—")
    if rest.lstrip()[:1] in ("?", "/", "|", "&", "+") or re.match(r"(?:or|and|nor|vs|versus)\b", first, re.IGNORECASE):
        return False
    if re.match(_DOUBT, first):
        return False
    other = _OTHER.match(first)
    if not other or not letter:
        return True
    same = other[2].lower() == letter
    if other[1]:
        return not same
    # "B, a clear winner" names no other choice.
    return same or (other[2] == "a" and bool(re.match(r"a\s+[a-z]", first)))


def _last_line(line: str) -> float | None:
    """Returns the label of a line that says nothing but its choice, such as `Overall, text A is better.`"""
    words = re.sub(rf"^[\W_]{{0,8}}{_OPENING}{_SPOKEN}", "", line[:_LONGEST], flags=re.IGNORECASE)
    found = _CHOICE.fullmatch(words)
    if not found:
        return None
    rest = found["rest"].strip(" \t\r\n.!*_'\"’”()[]{}<>|")
    praised = _PRAISED.fullmatch(rest) if found["letter"] else None
    if rest and not _COMPARED.fullmatch(rest) and not (praised and "." not in praised["rest"]):
        return None
    return _value(words)
