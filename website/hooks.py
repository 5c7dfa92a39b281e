"""Hooks of `mkdocs build`: pages made from the code, the notebooks and files beside the docs, and typeset formulas.

A link from a page to a file outside of `docs/` leads to that file on the site: a room of the library to its reference,
a notebook to its page, a script to its listing, a folder to its README and a list of what is in it.
"""

import html
import pathlib
import posixpath
import re

import formulas
import latex2mathml.converter
import notebook_pages
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxrlhf"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(```.*?^```\n?)", re.DOTALL | re.MULTILINE)
COPIED = {".png", ".json", ".csv", ".jsonl"}
LARGEST = 300_000
"""Bytes of a file that is copied to the site; a larger one is only named."""

sources: dict[str, str] = {}
"""The path in the repository of each page, by its path on the site."""


@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference, the notebooks, and whatever the pages link to outside of `docs/`."""
    sources.clear()
    for file in files.documentation_pages():
        sources[file.src_uri] = f"docs/{file.src_uri}"

    def add(uri: str, content: str | bytes) -> None:
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, content=content))

    for name in ("site.css", "site.js"):
        add(name, (ROOT / "website" / name).read_text())
    for room in reference.ROOMS:
        add(f"reference/{room}.md", reference.page(PACKAGE, room))
    add("reference/commands.md", reference.commands_page())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_pages.page_of(path.read_text(), path.stem)
        sources[f"notebooks/{path.stem}.md"] = f"notebooks/{path.name}"
        add(f"notebooks/{path.stem}.md", text)
        add(f"notebooks/{path.name}", path.read_bytes())
        for name, picture in pictures.items():
            add(f"notebooks/{name}", picture)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        sources[name.lower()] = name
        add(name.lower(), (ROOT / name).read_text())
    waiting = [file.content_string for file in files.documentation_pages() if file.src_uri in sources]
    places = [sources[file.src_uri] for file in files.documentation_pages() if file.src_uri in sources]
    queue = [target for text, place in zip(waiting, places, strict=True) for target in _targets(text, place)]
    while queue:
        path = queue.pop()
        uri = _uri(path)
        if uri in files.src_uris or not (ROOT / path).exists():
            continue
        if (ROOT / path).is_dir():
            text = _folder(path)
        elif path.endswith(".py"):
            text = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n```python\n{(ROOT / path).read_text()}```\n"
        elif path.endswith(".md"):
            text = (ROOT / path).read_text()
        else:
            add(uri, (ROOT / path).read_bytes())
            continue
        sources[uri] = path if not (ROOT / path).is_dir() else f"{path}/README.md"
        add(uri, text)
        queue += _targets(text, sources[uri])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links that leave `docs/`."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    place = sources.get(page.file.src_uri)
    if place is None:
        return markdown

    def rewrite(match: re.Match[str]) -> str:
        path, anchor = _target(match[2], place)
        if path is None:
            return match[0]
        uri = posixpath.relpath(_uri(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{uri}{anchor if uri.endswith('.md') else ''}{match[3]}"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Typesets formulas: blocks of plain text that are formulas, and the TeX of notebooks."""

    def block(match: re.Match[str]) -> str:
        text = html.unescape(re.sub(r"<[^>]+>", "", match[2]))
        return formulas.typeset(text) if formulas.is_formula(text) else match[0]

    def tex(match: re.Match[str]) -> str:
        wide = match[1] == "div"
        source = html.unescape(match[2]).strip().removeprefix("\\[").removeprefix("\\(")
        source = source.removesuffix("\\]").removesuffix("\\)")
        source = re.sub(r"\\arg(?![a-z])", r"\\operatorname{arg}", source)
        made = latex2mathml.converter.convert(source, display="block" if wide else "inline")
        if "\\" in made:
            raise PluginError(f"{page.file.src_uri}: this TeX is not understood: {source}")
        return f'<div class="formula" tabindex="0">{made}</div>' if wide else made

    content = re.sub(
        r'<div class="(?:language-text )?highlight"><pre>(<span></span>)?<code>(.*?)</code></pre></div>',
        block, content, flags=re.DOTALL,
    )  # fmt: skip
    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', tex, content, flags=re.DOTALL)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Names the theme's dialogue for people who do not see it."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def _target(link: str, place: str) -> tuple[str | None, str]:
    """The path in the repository that a link of a page leads to, if it leaves the page and the site has it elsewhere."""
    path, hash_mark, anchor = link.partition("#")
    if not path or ":" in path or path.startswith("/"):
        return None, ""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
    if found.startswith("..") or not (ROOT / found).exists():
        return None, ""
    return found, hash_mark + anchor


def _targets(text: str, place: str) -> list[str]:
    prose = FENCE.sub("", text)
    return [path for _, link, _ in LINK.findall(prose) if (path := _target(link, place)[0]) is not None]


def _uri(path: str) -> str:
    """Where the site has a file or folder of the repository."""
    first, _, rest = path.partition("/")
    if path in ("README.md", "docs", "docs/index.md"):
        return "index.md"
    if first == "docs":
        return rest
    if path in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        return path.lower()
    if path.startswith("notebooks/") and path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    room = rest.split("/")[0]
    if first == "jaxrlhf" and (ROOT / path).is_dir() and room in reference.ROOMS:
        return f"reference/{room}.md"
    if path == "jaxrlhf/commands":
        return "reference/commands.md"
    if (ROOT / path).is_dir():
        return f"code/{path}/index.md"
    if path.endswith("/README.md"):
        return f"code/{path.removesuffix('README.md')}index.md"
    return f"code/{path}.md" if path.endswith(".py") else f"code/{path}"


def _folder(path: str) -> str:
    """The README of a folder, or its name, and a list of what is in it."""
    readme = ROOT / path / "README.md"
    text = readme.read_text() if readme.exists() else f"# {path}\n"
    entries = []
    for entry in sorted((ROOT / path).iterdir()):
        if entry.name.startswith((".", "_")) or entry.name == "README.md":
            continue
        shown = entry.is_dir() or entry.suffix in (".py", ".md", ".ipynb") or (
            entry.suffix in COPIED and entry.stat().st_size <= LARGEST
        )  # fmt: skip
        entries.append(f"- [`{entry.name}`]({entry.name})" if shown else f"- `{entry.name}`")
    return f"{text.rstrip()}\n\n## Files in {path}\n\n" + "\n".join(entries) + "\n"
