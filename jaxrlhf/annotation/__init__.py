"""Host-side annotators, outside JAX: Python functions, an LLM judge behind HTTP, and a journal of paid labels."""

from jaxrlhf.annotation.chat import BudgetError, JudgeError
from jaxrlhf.annotation.functions import Annotate, Score, host_annotator, host_scorer, load_function
from jaxrlhf.annotation.journal import Counts, Journaled, journaled, question_key
from jaxrlhf.annotation.journal_file import Journal
from jaxrlhf.annotation.judge import HttpJudge, http_judge, load_judge
from jaxrlhf.annotation.verdict import Replies, read_verdict

__all__ = [
    "Annotate",
    "BudgetError",
    "Counts",
    "HttpJudge",
    "Journal",
    "Journaled",
    "JudgeError",
    "Replies",
    "Score",
    "host_annotator",
    "host_scorer",
    "http_judge",
    "journaled",
    "load_function",
    "load_judge",
    "question_key",
    "read_verdict",
]
