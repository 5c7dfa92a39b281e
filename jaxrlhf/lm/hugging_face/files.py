"""Files of a Hugging Face model directory: JSON and safetensors, never pickles.

Anything wrong with a directory raises `WeightsError`, whose one sentence names the problem and the remedy.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


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
        raise WeightsError(
            f"{directory} is not a directory: give the local directory of a Hugging Face model; nothing is downloaded."
        )
    path = directory / name
    if not path.is_file():
        raise WeightsError(f"{directory} has no {name}: give the directory that the model was saved to.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}): copy or save it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object: copy or save it again.")
    return content


def write_json(directory: Path, name: str, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(directory / name, lambda path: path.write_text(text, encoding="utf-8"))


def read_tensors(
    directory: str | Path, shapes: Mapping[str, tuple[int, ...]], *, optional_prefix: str = ""
) -> dict[str, np.ndarray]:
    """Returns named tensors of `model.safetensors`, or of the files that its index lists.

    All names, shapes and dtypes are checked before the first tensor is read.

    Args:
        directory: the model directory.
        shapes: the required shape of each tensor to read; other tensors are ignored.
        optional_prefix: of names; a file may omit it.

    Returns:
        The tensors, in the dtype they are stored in.

    Raises:
        WeightsError: there are no safetensors files, one is missing, damaged or outside the directory, or a
            tensor is missing, has another shape or holds no floats.
    """
    try:
        files = [safe_open(path, framework="numpy") for path in tensor_files(Path(directory))]
        holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        stored = {name: name if name in holders else name.removeprefix(optional_prefix) for name in shapes}
        for name, shape in shapes.items():
            check_tensor(Path(directory), stored[name], shape, holders.get(stored[name]))
        return {name: holders[stored[name]].get_tensor(stored[name]) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"A safetensors file in {directory} is damaged or cut short ({error}): copy or save it again."
        ) from error


def check_tensor(directory: Path, name: str, shape: tuple[int, ...], file: Any) -> None:
    """Raises WeightsError unless the open safetensors file (or None) has the tensor in this shape."""
    if file is None:
        raise WeightsError(
            f"{directory} has no tensor {name}, which its config.json asks for: save model and config together."
        )
    view = file.get_slice(name)
    found, dtype = tuple(view.get_shape()), view.get_dtype()
    if found != shape:
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
