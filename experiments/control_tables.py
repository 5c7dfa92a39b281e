"""The end of a study of control tasks: its tables as a file, as a report with the figures, and on the screen."""

import pathlib
from typing import Any

from jaxrlhf.training.report import tables_of, write_report


def publish_tables(output: pathlib.Path, text: str, *, title: str, summary: str, config: Any) -> None:
    """Writes `tables.md` and `report.html` into the study's folder, and prints the tables and the folder.

    Args:
        output: the folder; its .png files are in the report.
        text: tables in Markdown.
        title, summary, config: of the report.
    """
    (output / "tables.md").write_text(text.strip() + "\n")
    figures = sorted(path.name for path in output.glob("*.png"))
    write_report(output, title=title, summary=summary, tables=tables_of(text), figures=figures, config=config)
    print(text)
    print(output)
