"""People label: a queue of pairs over the journal, and the page that shows them."""

from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.page import Page
from jaxrlhf.labelling.pairs import Pair, Turn, make_pair
from jaxrlhf.labelling.people import majority, summary
from jaxrlhf.labelling.queue import Queue, QueueError
from jaxrlhf.labelling.store import LabelStore

__all__ = [
    "Board",
    "LabelStore",
    "Page",
    "Pair",
    "Queue",
    "QueueError",
    "Turn",
    "majority",
    "make_pair",
    "summary",
]
