"""Notebooks as pages, with the outputs that are stored in them."""

import base64
import json
import re
from typing import Any


def page_of(text: str, name: str) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by their file names."""
    parts, pictures = [], {}
    download = f'<a class="md-button" href="{name}.ipynb" download>Download this notebook</a>'
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            if download:
                parts.append(download)
                download = ""
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(_output(output, f"{name}-{cell['id']}-{len(pictures)}.png", pictures))
    return "\n\n".join(parts) + "\n", pictures


def _output(output: dict[str, Any], picture: str, pictures: dict[str, bytes]) -> str:
    if output["output_type"] == "stream":
        return f"``` {{ .text .output }}\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "image/png" in data:
        pictures[picture] = base64.b64decode("".join(data["image/png"]))
        return f"![What the cell above draws]({picture}){{ .output }}"
    if "text/html" in data:
        # A block of HTML may hold no empty line in Markdown.
        return '<div class="output">' + re.sub(r"\n\s*\n", "\n", "".join(data["text/html"])) + "</div>"
    return f"``` {{ .text .output }}\n{''.join(data['text/plain'])}\n```"
