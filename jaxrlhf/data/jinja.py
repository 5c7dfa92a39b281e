"""Jinja as transformers sets it up for chat templates: the same names, filters and extensions, in a sandbox."""

import datetime
import functools
import json
import re
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# From Unicode's private use area, refused inside messages: around a generation block, and at a place in a content.
BEGIN, END, HERE = "\uf8f0", "\uf8f1", "\uf8f2"
ANY_KEY = "*"


def render_template(source: str, variables: dict[str, Any]) -> str:
    """Returns a template's text, with markers around its generation blocks.

    Raises:
        ValueError: the template fails, refuses the conversation, or asks for something that is not given; the message
            says what.
    """
    try:
        return compiled(source).render(variables)
    # A template is foreign code, and Jinja lets through whatever its operations raise.
    except Exception as error:
        raise ValueError(_reason(source, error)) from None


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """Returns a compiled template; raises jinja2.TemplateError if it is malformed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


@functools.lru_cache(maxsize=16)
def has_generation_blocks(source: str) -> bool:
    """Returns whether a template marks what the assistant wrote."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


@functools.lru_cache(maxsize=16)
def names_read(source: str) -> frozenset[str]:
    """Returns all names that a template mentions, of variables, attributes and keys, and `ANY_KEY` if it may read any key.

    A key is mentioned as `message.key`, `message["key"]`, `"key" in message` or `message.get("key")`. A template that
    passes a whole message on, as in `message | tojson` or `message.items()`, may read any; a malformed one counts as such.
    """
    try:
        tree = compiled(source).environment.parse(source)
    except jinja2.TemplateError:
        return frozenset({ANY_KEY})
    messages = {
        node.node.name
        for node in tree.find_all((jinja2.nodes.Getattr, jinja2.nodes.Getitem))
        if isinstance(node.node, jinja2.nodes.Name) and _key(node) == "role"
    }
    names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    for node in tree.find_all((jinja2.nodes.Filter, jinja2.nodes.Getattr)):
        whole = isinstance(node, jinja2.nodes.Filter) and node.name in ("tojson", "items", "dictsort", "string")
        whole = whole or (isinstance(node, jinja2.nodes.Getattr) and node.attr in ("items", "values", "keys"))
        if whole and isinstance(node.node, jinja2.nodes.Name) and node.node.name in messages:
            names.add(ANY_KEY)
    names |= {_key(node) for node in tree.find_all((jinja2.nodes.Getattr, jinja2.nodes.Getitem))}
    return frozenset(names | {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)})


class _Generation(Extension):
    """The blocks `{% generation %}...{% endgeneration %}`, which mark what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        return BEGIN + caller() + END


class _Dict:
    """The constructor of dicts, without the attributes of the class."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args, **kwargs):
        self, *values = args
        entries = dict(*values, **kwargs)
        for name in entries:
            _check_name(name)
        Namespace.__init__(self, entries)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name} of a namespace is unsafe")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _key(node: Any) -> str:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, jinja2.nodes.Const) and isinstance(node.arg.value, str) else ""


def _reason(source: str, error: Exception) -> str:
    """Returns what went wrong in a template, in one sentence."""
    text = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    missing = re.fullmatch(r"'(\w+)' is undefined", text)
    if isinstance(error, jinja2.UndefinedError) and missing:
        undeclared = jinja2.meta.find_undeclared_variables(compiled(source).environment.parse(source))
        if missing[1] in undeclared - set(compiled(source).globals):
            return (
                f"it asks for '{missing[1]}', which neither this library nor transformers gives a template; mend it, or "
                "give the value under chat_template_kwargs of each record"
            )
    missing = re.fullmatch(r"No (filter|test) named '(\w+)'( found)?", text)
    if missing:
        return f"it asks for the {missing[1]} '{missing[2]}', which neither Jinja nor transformers has; mend it"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{text.split('. ')[0]} (line {error.lineno})"
    return text
