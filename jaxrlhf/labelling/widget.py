"""The labelling page as a cell of a notebook, over the same queue and journal.

    widget = label_widget(queue, board, after=advance)
    widget                                                # the last line of a cell shows it

The kernel answers the widget's requests between cells, so that nothing waits in a cell: `after` is called after each label
and takes the next step of a run once the labels of the present one are there.
"""

from collections.abc import Callable
from typing import Any

from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.queue import Queue, QueueError
from jaxrlhf.labelling.server import STATIC, handlers

MISSING = "The labelling widget needs anywidget, which is not installed; pip install 'jaxrlhf[notebooks]'."


def label_widget(
    queue: Queue, board: Board, *, person: str = "notebook", after: Callable[[], None] = lambda: None
) -> Any:
    """Returns an `anywidget.AnyWidget` that shows the queue's pairs and takes labels by click and by key.

    Texts are shown by the code of the page, as text and never as HTML. Two views of one widget are two tabs.

    Args:
        queue: of pairs; its store may be in memory.
        board: what is shown beside them.
        person: whose labels these are.
        after: called after each label; it may add pairs. What it raises is shown in the widget, and raised again.

    Raises:
        ValueError: anywidget is not installed.
    """
    try:
        import anywidget
    except ImportError:
        raise ValueError(MISSING) from None

    class LabelWidget(anywidget.AnyWidget):
        _esm = (STATIC / "text.js").read_text() + (STATIC / "widget.js").read_text()
        _css = (STATIC / "widget.css").read_text()

        def __repr__(self) -> str:
            return "the labelling widget"

    widget, answer = LabelWidget(), responder(queue, board, person=person, after=after)
    widget.on_msg(lambda _, message, buffers: answer(message, widget.send))
    return widget


def responder(
    queue: Queue, board: Board, *, person: str, after: Callable[[], None]
) -> Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]:
    """Returns `(message, send)`, which carries out a request of the widget and sends one answer.

    A message has the `name` of a request of `server.handlers` and its `fields`; the answer is that of the page, with the
    tab that asked.
    """
    table = handlers(queue, board)

    def respond(message: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        name, fields = message["name"], message["fields"]
        tab = {"tab": fields["tab"]}
        try:
            found = table[name](person, fields)
        except QueueError as error:
            send(table["next"](person, tab) | tab | {"error": str(error)})
            return
        if name == "label":
            try:
                after()
            except Exception as error:
                send(table["next"](person, tab) | tab | {"error": f"{type(error).__name__}: {error}"})
                raise
            # Counts have changed, and there may be pairs again.
            found |= table["next"](person, tab)
        send(found | tab)

    return respond
