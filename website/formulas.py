"""Formulas of docstrings and pages, written as plain text, typeset as MathML: no script and no font of another address.

    grad Phi = E[grad_phi cost] + (1 / beta) Cov_pi(dG/dpi, grad_phi R)

Every token has a rendering, so that no formula fails: a word that is not known is set as a word.
"""

import ast
import re
from html import escape

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "eps": "ε", "theta": "θ", "kappa": "κ",
    "lambda": "λ", "mu": "μ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "psi": "ψ", "omega": "ω",
    "Phi": "Φ", "Delta": "Δ", "Sigma": "Σ",
}  # fmt: skip
OPERATORS = {
    "->": "→", "<-": "←", "<=": "≤", ">=": "≥", "||": "∥", "-": "−", "*": "⋅", "...": "…", "=": "=", "+": "+",
    "/": "/", "<": "<", ">": ">", "|": "|", ",": ",", ";": ";", ":": ":", ".": ".", "~": "∼", "!": "!",
}  # fmt: skip
FUNCTIONS = {"log", "exp", "min", "max", "argmax", "argmin", "clip", "sigmoid", "tanh", "softmax", "KL", "Cov", "sqrt"}
LARGE = {"sum": "∑", "grad": "∇", "E": "𝔼", "P": "P"}
WORDS = {"an", "as", "at", "by", "if", "in", "is", "of", "on", "or", "to"}
CODE = re.compile(
    r"^\s*(>>>|\$ |@|def |class |import |from |with |for |\.?/?\S*(python|jaxrlhf|pip|pytest)\b)|[\"`#]|(?<!\w)'|--\w|://"
)
RELATION = re.compile(r" (=|->|<-|becomes|minimises|maximises|minimise|argmax|sum_\w+) |\bE\[|\bE_\S+?\[|\bCov_\w+\(")
TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?(?:st|nd|rd|th)?)|(?P<name>[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z]\w*)*'?)"
    r"|(?P<sub>_)|(?P<sup>\^)|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<operator>->|<-|<=|>=|\|\||\.\.\.|\S)"
)


def is_formula(text: str) -> bool:
    """Whether a block of plain text is a formula, rather than code, a command or a drawing."""
    if any(CODE.search(line) for line in text.splitlines()) or not RELATION.search(text):
        return False
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return not any(call.keywords or isinstance(call.func, ast.Attribute) for call in calls)


def typeset(text: str) -> str:
    """Returns a block of formulas, one a line, as HTML with MathML; columns that the text aligns stay apart."""
    rows = []
    for line in text.strip("\n").splitlines():
        cells = [cell for cell in re.split(r" {2,}", line.strip()) if cell]
        # A part of its own each, so that a narrow screen may break the line between them.
        parts = " ".join(f"<span><math>{_Line(cell).read()}</math></span>" for cell in cells)
        label = escape(line.strip(), quote=True)
        rows.append(f'<div class="formula" tabindex="0" role="group" aria-label="{label}">{parts}</div>')
    return "\n".join(rows)


class _Line:
    """A recursive reader of one line: tokens to MathML, left to right."""

    def __init__(self, text: str):
        self.tokens = [(match.lastgroup or "", match[0]) for match in TOKEN.finditer(text)]
        self.at = 0

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else ("end", "")

    def read(self, closing: str = "") -> str:
        parts: list[str] = []
        while (token := self.peek())[0] != "end" and not (token[0] == "close" and closing):
            if token[0] == "space":
                self.at += 1
                before, after = self.peek(-2)[0], self.peek()[0]
                if parts and before in ("name", "number", "close") and after in ("name", "number", "open"):
                    parts.append('<mspace width="0.28em"/>')
                continue
            parts.append(self.scripts(self.atom()))
        return f"<mrow>{''.join(parts)}</mrow>"

    def atom(self) -> str:
        kind, text = self.peek()
        self.at += 1
        if kind == "open":
            inside = self.read(closing=text)
            _, close = self.peek()
            self.at += 1
            return f"<mrow>{_operator(text)}{inside}{_operator(close)}</mrow>"
        if kind == "number":
            return f"<mn>{text}</mn>"
        if kind == "name":
            return _name(text)
        return _operator(OPERATORS.get(text, text))

    def scripts(self, base: str) -> str:
        """Adds what is attached without a space: `_x`, `^x`, or the star of an optimum, as in `lambda*(phi)`."""
        while True:
            kind, text = self.peek()
            if kind in ("sub", "sup"):
                self.at += 1
                sign = self.atom() if self.peek()[1] == "-" else ""
                script = sign + (self.group() if self.peek()[0] == "open" else self.atom())
                tag = "msub" if kind == "sub" else "msup"
            elif text == "*" and self.peek(-1)[0] == "name" and self.peek(1)[0] in ("open", "end", "space", "close"):
                self.at += 1
                script, tag = "<mo>∗</mo>", "msup"
            else:
                return base
            base = f"<{tag}>{base}<mrow>{script}</mrow></{tag}>"

    def group(self) -> str:
        """The inside of brackets that only hold a script together."""
        _, opening = self.peek()
        self.at += 1
        inside = self.read(closing=opening)
        self.at += 1
        return inside


def _operator(text: str) -> str:
    if text in ("(", ")", "[", "]", "{", "}", "|"):
        return f'<mo stretchy="false">{text}</mo>'
    return f"<mo>{escape(text)}</mo>"


def _name(text: str) -> str:
    """A name with its subscripts: `grad_phi`, `sum_i`, `pi(...)`, or a word such as `coupled_cost`."""
    prime = "′" if text.endswith("'") else ""
    base, *scripts = text.rstrip("'").split("_")
    short = len(base) == 1 or base in GREEK or base in FUNCTIONS or base in LARGE
    if scripts and not short:
        return f"<mtext>{escape(text.replace('_', ' '))}</mtext>"
    symbol = _symbol(base) if not prime else f"<msup>{_symbol(base)}<mo>{prime}</mo></msup>"
    if scripts:
        return f"<msub>{symbol}<mrow>{'<mo>,</mo>'.join(_symbol(script) for script in scripts)}</mrow></msub>"
    return symbol


def _symbol(name: str) -> str:
    if name in GREEK:
        return f"<mi>{GREEK[name]}</mi>"
    if name in LARGE:
        return f"<mo>{LARGE[name]}</mo>" if name in ("sum", "grad") else f"<mi>{LARGE[name]}</mi>"
    if name[:1] == "d" and (name[1:] in GREEK or len(name) == 2):
        return f"<mrow><mi>d</mi>{_symbol(name[1:])}</mrow>"
    numbered = re.fullmatch(r"([A-Za-z])(\d+)", name)
    if numbered:
        return f"<msub><mi>{numbered[1]}</mi><mn>{numbered[2]}</mn></msub>"
    if len(name) == 1 or name in FUNCTIONS:
        return f"<mi>{name}</mi>"
    if len(name) == 2 and name not in WORDS:
        return f"<mrow><mi>{name[0]}</mi><mi>{name[1]}</mi></mrow>"
    return f"<mtext>{escape(name)}</mtext>"
