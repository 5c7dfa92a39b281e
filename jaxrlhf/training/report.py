"""A run's report: a self-contained HTML file with tables, figures, samples and settings."""

import base64
import io
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jinja2
import rich.table
from rich.console import Console
from rich.text import Text

import jaxrlhf
from jaxrlhf.training.progress import number_text
from jaxrlhf.training.run_folder import plain

MIME = {".png": "image/png", ".svg": "image/svg+xml"}


class Table(NamedTuple):
    """A table.

    Attributes:
        title: heading above the table.
        columns: column headers.
        rows: one cell per column: text, a number (floats show 4 significant digits, ints all) or None (empty).
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Samples(NamedTuple):
    """Completions of the same prompts by several policies, shown side by side.

    Attributes:
        title: heading above the samples.
        columns: names of the policies.
        rows: (prompt, one completion per column) each.
    """

    title: str
    columns: Sequence[str] = ("before", "after")
    rows: Sequence[tuple[str, Sequence[str]]] = ()


def write_report(
    folder: str | os.PathLike,
    *,
    title: str,
    summary: str,
    tables: Sequence[Table],
    figures: Sequence[str],
    config: Any,
    samples: Sequence[Samples] = (),
    notes: Sequence[str] = (),
) -> pathlib.Path:
    """Writes `folder/report.html`, a self-contained page without scripts; returns its path.

    Args:
        folder: the run's folder.
        title: the report's title.
        summary: plain text; an empty line starts a new paragraph.
        tables: shown in order.
        figures: names of .png or .svg files in `folder`.
        config: a dataclass or dict, shown collapsed.
        samples: model outputs, shown verbatim.
        notes: one sentence each.

    Raises:
        ValueError: a figure is missing or of another file type, or a row does not have one cell per column.
    """
    folder = pathlib.Path(folder)
    for group in samples:
        for prompt, texts in group.rows:
            _check_width(group.title, f"{prompt!r:.40}", len(texts), len(group.columns))
    return write_page(
        folder / "report.html",
        title=title,
        summary=summary,
        tables=tables,
        figures=[_figure_file(folder, name) for name in figures],
        config=config,
        samples=samples,
        notes=notes,
        where=f", on {jax.device_count()} × {jax.devices()[0].device_kind}",
    )


def write_page(
    path: pathlib.Path,
    *,
    title: str,
    summary: str,
    tables: Sequence[Table],
    figures: Sequence[pathlib.Path],
    config: Any,
    after_figures: Sequence[Table] = (),
    samples: Sequence[Samples] = (),
    notes: Sequence[str] = (),
    where: str = "",
) -> pathlib.Path:
    """Writes a self-contained page without scripts, whole or not at all; returns its path.

    Args:
        path: of the page.
        title: as for `write_report`, and so are summary, tables, config, samples and notes.
        summary: plain text.
        tables: shown before the figures.
        figures: .png or .svg files.
        config: shown collapsed.
        after_figures: tables shown below the figures.
        samples: model outputs.
        notes: one sentence each.
        where: what the page's last line says after the versions.
    """
    text = TEMPLATE.render(
        title=title,
        paragraphs=[part.strip() for part in re.split(r"\n\s*\n", summary) if part.strip()],
        tables=_shown(tables),
        figures=[(_caption(each.name), _data_uri(each)) for each in figures],
        after_figures=_shown(after_figures),
        samples=samples,
        notes=notes,
        config=json.dumps(plain(config), indent=2, default=str, ensure_ascii=False),
        versions=f"jaxrlhf {jaxrlhf.__version__}, JAX {jax.__version__}{where}",
    )
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        # A model's text may contain half a surrogate pair, which UTF-8 cannot encode.
        partial.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _shown(tables: Sequence[Table]) -> list[tuple]:
    return [(table.title, _right_aligned(table), table.columns, _cells(table)) for table in tables]


def tables_of(text: str) -> list[Table]:
    """Returns the tables of a Markdown text, titled by the preceding heading, without bold and code marks."""
    tables: list[Table] = []
    title, rows = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([re.sub(r"[*`]", "", cell).strip() for cell in line.strip().strip("|").split("|")])
            continue
        if len(rows) > 2:
            # The second line of a Markdown table is the delimiter row.
            tables.append(Table(title, rows[0], [row for row in rows[2:] if len(row) == len(rows[0])]))
        rows = []
        if line.startswith("#"):
            title = line.lstrip("# ").strip()
    return tables


def rich_table(table: Table) -> rich.table.Table:
    """Returns the table as the report shows it, for a terminal."""
    shown = rich.table.Table(title=Text(table.title), title_justify="left")
    for number, (column, right) in enumerate(zip(table.columns, _right_aligned(table), strict=True)):
        # Names, such as paths, are shown whole.
        shown.add_column(Text(column), justify="right" if right else "left", overflow="ellipsis" if number else "fold")
    for row in _cells(table):
        shown.add_row(*map(Text, row))
    return shown


def as_text(table: Table) -> str:
    """Returns the table as the report shows it, in plain text of unlimited width."""
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(rich_table(table))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def as_markdown(table: Table) -> str:
    """Returns the table as the report shows it, in Markdown, its title in bold above."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (table.columns, *_cells(table))]
    heads, *lines = ("| " + " | ".join(row) + " |" for row in rows)
    rule = "|" + "".join("---:|" if right else "---|" for right in _right_aligned(table))
    return "\n".join([f"**{table.title}**", "", heads, rule, *lines, ""])


def _cells(table: Table) -> list[list[str]]:
    return [["" if cell is None else _cell(cell) for cell in row] for row in _values(table)]


def _cell(cell: Any) -> str:
    return number_text(cell) if _is_number(cell) else str(cell)


def _values(table: Table) -> list[list[Any]]:
    """Returns the rows with array scalars converted to Python numbers."""
    for row in table.rows:
        _check_width(table.title, f"{row[0] if row else ''}", len(row), len(table.columns))
    return [[cell.item() if getattr(cell, "ndim", None) == 0 else cell for cell in row] for row in table.rows]


def _is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _right_aligned(table: Table) -> list[bool]:
    """Returns for each column whether all its cells are numbers, or texts that begin like one ("0.51 ± 0.02")."""
    rows = _values(table)
    columns = [[row[index] for row in rows if row[index] is not None] for index in range(len(table.columns))]
    return [
        bool(cells) and all(_is_number(cell) or re.match(r"[-+−<>~≈]?\s?\.?\d", str(cell)) for cell in cells)
        for cells in columns
    ]


def _check_width(title: str, row: str, cells: int, columns: int) -> None:
    if cells != columns:
        raise ValueError(f"The row {row} of {title!r} has {cells} cells for {columns} columns.")


def _caption(name: str) -> str:
    return pathlib.PurePath(name).stem.replace("_", " ")


def _figure_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / name
    if path.suffix not in MIME:
        raise ValueError(f"The figure {name} is neither a .png nor a .svg file.")
    if not path.is_file():
        raise ValueError(f"The figure {name} is not in {folder}; draw it before the report is written.")
    return path


def _data_uri(path: pathlib.Path) -> str:
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


STYLE = """
:root { --text: #1c1e21; --dim: #6a7079; --line: #dfe2e6; --soft: #f5f6f8; --page: #fff; color-scheme: light; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e4e6e9; --dim: #9aa1ab; --line: #363b42; --soft: #20242a; --page: #16191d; color-scheme: dark; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem; max-width: 62rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; break-after: avoid; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--dim); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1.5rem 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; padding: .5rem; border-radius: 6px; background: #fff; }
figcaption, footer, .policy { color: var(--dim); font-size: .85rem; }
.sample { margin: 0 0 1rem; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px; break-inside: avoid; }
.prompt { font-weight: 600; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin-top: .6rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.texts .text { padding: .5rem .7rem; border-radius: 4px; background: var(--soft); min-height: 2.5rem; font-size: .95rem; }
pre { padding: .8rem 1rem; border-radius: 6px; background: var(--soft); font-size: .85rem; white-space: pre-wrap; }
summary { cursor: pointer; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  th, td { padding: .2rem .4rem; } }
"""

# The content security policy blocks scripts and external resources, in case a text escapes the escaping. dir="auto" keeps
# right-to-left text from changing the direction of its surroundings.
PAGE = """{% macro show(tables) %}
{% for table_title, right, columns, rows in tables %}
<h2>{{ table_title }}</h2>
<div class="scroll"><table>
<thead><tr>
{% for column in columns %}
<th scope="col"{% if right[loop.index0] %} class="number"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr>
{% for cell in row %}
<td{% if right[loop.index0] %} class="number"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for paragraph in paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{{ show(tables) }}
{% if figures %}
<h2>Figures</h2>
{% for caption, uri in figures %}
<figure><img src="{{ uri }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% endif %}
{{ show(after_figures) }}
{% for group in samples %}
<h2>{{ group.title }}</h2>
{% for prompt, texts in group.rows %}
<div class="sample">
<div class="text prompt" dir="auto">{{ prompt }}</div>
<div class="texts">
{% for text in texts %}
<div><div class="policy">{{ group.columns[loop.index0] }}</div><div class="text" dir="auto">{{ text }}</div></div>
{% endfor %}
</div>
</div>
{% endfor %}
{% endfor %}
{% if notes %}
<h2>Notes</h2>
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
<h2>Configuration</h2>
<details><summary>show</summary><pre>{{ config }}</pre></details>
<footer>{{ versions }}</footer>
</body>
</html>
"""

TEMPLATE = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string(PAGE, globals={"style": STYLE})
