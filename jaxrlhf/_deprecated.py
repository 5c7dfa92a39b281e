"""Old names that still work for a while: functions, arguments and attributes of modules that were renamed.

Each use of an old name warns with a `DeprecationWarning` at the caller's line, with the new name and the version without
the old one. `tests/api/public_api_test.py` fails from that version on until the old name is removed.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed_function(old: str, new: Function, *, until: str) -> Function:
    """Returns `new` under its old name: `fit = renamed_function("fit", refit, until="0.3.0")`.

    Args:
        old: the old name.
        new: the function, or class to be called.
        until: the first version without the old name.
    """

    @functools.wraps(new)
    def deprecated(*args: Any, **kwargs: Any) -> Any:
        _warn(f"{old} is now {new.__name__}", until)
        return new(*args, **kwargs)

    deprecated.__name__ = deprecated.__qualname__ = old
    deprecated.__doc__ = f"Deprecated: the old name of `{new.__name__}`, until {until}."
    return deprecated  # pyright: ignore[reportReturnType]


def renamed_arguments(*, until: str, **new_names: str) -> Callable[[Function], Function]:
    """Decorates a function that takes some keyword arguments under their old names too: `old="new"`.

        @renamed_arguments(until="0.3.0", parts="microbatches")
        def plan(*, microbatches): ...

    Args:
        until: the first version without the old names.
        **new_names: the new name of each old one.

    Raises:
        TypeError: when called, with an argument under both names.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def accepting(*args: Any, **kwargs: Any) -> Any:
            for old in [name for name in kwargs if name in new_names]:
                new = new_names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got {new} and its old name {old}; give {new} alone.")
                _warn(f"The argument {old} of {function.__name__}() is now {new}", until)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accepting  # pyright: ignore[reportReturnType]

    return decorate


def renamed_attributes(module: str, new_places: Mapping[str, str], *, until: str) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a module, through which old names of its attributes lead to the new ones.

        __getattr__ = renamed_attributes(__name__, {"codec": "jaxrlhf.data.chat.chat_tokenizer"}, until="0.3.0")

    Args:
        module: the module's name.
        new_places: of each old name, the full new one: module and attribute.
        until: the first version without the old names.
    """

    def find(name: str) -> Any:
        if name not in new_places:
            # In Python's own words, by which hasattr and `from module import name` know it.
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, attribute = new_places[name].rpartition(".")
        value = getattr(importlib.import_module(place), attribute)
        _warn(f"{module}.{name} is now {new_places[name]}", until)
        return value

    return find


def _warn(sentence: str, until: str) -> None:
    # Past this function and the one that calls it.
    warnings.warn(f"{sentence}; the old name is there until jaxrlhf {until}.", DeprecationWarning, stacklevel=3)
