"""Files of a Hugging Face model directory: JSON and safetensors, never pickles.

Anything wrong with a directory raises `WeightsError`, whose one sentence names the problem and the remedy.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
ADAPTER = "adapter_config.json"
HEAD = "lm_head.weight"
RECOMPUTED = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq)|attn\.(bias|masked_bias))$")
"""Buffers that older versions of transformers wrote: rotary frequencies, and GPT-2's causal mask."""


class WeightsError(ValueError):
    """A model directory that cannot be read or written."""


def read_json(directory: str | Path, name: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
        directory: the model directory.
        name: the file's name within it.

    Returns:
        The object.

    Raises:
        WeightsError: the directory or the file does not exist, or holds no JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory} is not a directory: give the local directory of a Hugging Face model.")
    path = directory / name
    if not path.is_file():
        raise WeightsError(f"{directory} has no {name}: give the directory that the model was saved to.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): copy or save it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object: copy or save it again.")
    return content


def vocabulary_size(directory: str | Path) -> int | None:
    """Returns `vocab_size` of `config.json`, None where it has none.

    Raises:
        WeightsError: it is not a positive number.
    """
    size = read_json(directory, "config.json").get("vocab_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise WeightsError(
            f"vocab_size in {Path(directory) / 'config.json'} is {size!r}: make it the number of tokens."
        )
    return size


def write_json(directory: Path, name: str, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(directory / name, lambda path: path.write_text(text, encoding="utf-8"))


class Stored(NamedTuple):
    """Tensors of a model's files, and a sentence for those that were not asked for."""

    tensors: dict[str, np.ndarray]
    notes: tuple[str, ...]


def read_tensors(
    directory: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    optional: Sequence[str] = (),
    optional_prefix: str = "",
    aliases: Mapping[str, str] = {},
) -> Stored:
    """Returns named tensors of `model.safetensors`, or of the files that its index lists.

    All names, shapes and dtypes are checked before the first tensor is read.

    Args:
        directory: the model directory.
        shapes: the required shape of each tensor to read.
        optional: further tensors to read where they are, in any shape.
        optional_prefix: of names; a file may omit it.
        aliases: names under which a tensor is looked for last, by its own name.

    Returns:
        The tensors, in the dtype they are stored in; all other names are in the notes.

    Raises:
        WeightsError: there are no safetensors files, one is missing, damaged or outside the directory, or a
            tensor is missing, has another shape or holds no floats.
    """
    try:
        files = [safe_open(path, framework="numpy") for path in tensor_files(Path(directory))]
        holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        stored = {}
        for name in shapes:
            known_as = (name, name.removeprefix(optional_prefix), aliases.get(name, name))
            stored[name] = next((found for found in known_as if found in holders), name)
        for name, shape in shapes.items():
            check_tensor(Path(directory), stored[name], shape, holders.get(stored[name]))
        for name in set(optional) & (holders.keys() - shapes.keys()):
            check_tensor(Path(directory), name, None, holders[name])
            stored[name] = name
        tensors = {name: holders[source].get_tensor(source) for name, source in stored.items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"A safetensors file in {directory} is damaged or cut short ({error}): copy or save it again."
        ) from error
    return Stored(tensors, notes_on_unread(holders.keys() - set(stored.values())))


def notes_on_unread(names: Collection[str]) -> tuple[str, ...]:
    """Returns a sentence for tensors that a model's configuration asks for by no name, such as another model's."""
    unknown = sorted(name for name in names if not RECOMPUTED.search(name))
    notes = []
    if len(unknown) < len(names):
        known = next(name for name in sorted(names) if name not in unknown)
        notes.append(f"{_count(len(names) - len(unknown))} computed anew and not read, such as {known}.")
    if unknown:
        shown, more = ", ".join(unknown[:5]), len(unknown) - 5
        rest = f" and {more:,} more" if more > 0 else ""
        notes.append(f"{_count(len(unknown))} not read, as config.json asks for none of them: {shown}{rest}.")
    return tuple(notes)


def _count(number: int) -> str:
    return "1 tensor is" if number == 1 else f"{number:,} tensors are"


def equal_tensors(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two tensors are equal, whatever dtypes they are stored in."""
    if one.shape != other.shape:
        return False
    # A few rows at a time: a vocabulary's tensor is large.
    rows = range(0, len(one), 4096)
    return all(
        np.array_equal(one[row : row + 4096].astype(np.float64), other[row : row + 4096].astype(np.float64))
        for row in rows
    )


def check_tensor(directory: Path, name: str, shape: tuple[int, ...] | None, file: Any) -> None:
    """Raises WeightsError unless the open safetensors file (or None) has the tensor in this shape; None is any."""
    if file is None:
        raise WeightsError(
            f"{directory} has no tensor {name}, which its config.json asks for: save model and config together."
        )
    view = file.get_slice(name)
    found, dtype = tuple(view.get_shape()), view.get_dtype()
    if shape is not None and found != shape:
        raise WeightsError(
            f"{name} in {directory} has shape {found} where config.json asks for {shape}: save model and config "
            "together."
        )
    if dtype not in FLOATS:
        raise WeightsError(
            f"{name} in {directory} is stored as {dtype}: save the model unquantised, as one of {', '.join(FLOATS)}."
        )


def tensor_files(directory: Path) -> list[Path]:
    """Returns the safetensors files of a model; WeightsError if there are none, or one is missing or elsewhere."""
    if (directory / ADAPTER).is_file():
        raise WeightsError(
            f"{directory} holds an adapter ({ADAPTER}), which transformers would add to the model: merge it into the "
            "weights and save the model again, or remove its files."
        )
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickled:
            raise WeightsError(
                f"{directory} has pickled weights only ({pickled[0]}), and reading a pickle can run any code: "
                "save the model again as safetensors, on a machine where you trust it."
            )
        raise WeightsError(f"{directory} has no {WEIGHTS}: give the directory that the model was saved to.")
    weight_map = read_json(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{directory / INDEX} has no weight_map of file names: save the model again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        # Rejects names that any operating system would read as a path.
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise WeightsError(
                f"{directory / INDEX} lists {name!r}, which is not a .safetensors file of that directory: do not "
                "trust this download."
            )
        if not (directory / name).is_file():
            raise WeightsError(f"{directory} lacks {name}, which {INDEX} lists: fetch the missing file.")
    return [directory / name for name in names]


def write_tensors(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `model.safetensors` atomically."""
    # Contiguous: the writer would store the underlying buffer of a transposed view.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # transformers checks the format before it reads the file.
    write_atomically(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside `path` and renames, so that an interrupted save leaves the previous file."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    os.replace(partial, path)
