"""JSON values of lines and cells, refused where JSON parsers differ."""

import collections
import json
from typing import Any


def parse_line(line: str) -> Any:
    """Returns the JSON value of a line.

    Raises:
        ValueError: it is not JSON, an object names a key twice, or a text cannot be encoded.
    """
    if line.strip() in ("[", "{"):
        raise ValueError("not JSON on one line; write each record on a line of its own, not one value over many lines.")
    try:
        value = json.loads(line, object_pairs_hook=_object, parse_int=_integer)
        # JSON can escape half of a surrogate pair, which UTF-8 cannot encode.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno}).") from None
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair.") from None
    except RecursionError:
        raise ValueError("nested too deeply.") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name = next(name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {name} stands twice in one object.")
    return value


def _integer(digits: str) -> int:
    # Python refuses to convert numbers of thousands of digits; a float holds 309.
    if len(digits) > 1000:
        raise ValueError(f"a number has {len(digits):,} digits.")
    return int(digits)
