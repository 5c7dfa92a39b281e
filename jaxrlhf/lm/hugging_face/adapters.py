"""LoRA adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`, in and out.

An adapter that is read is merged into its base, W + scaling B A, so that everything else sees a plain model. One that is
written has the factors of `lm.lora` under the checkpoint's names: maps that are fused here share `down`, which becomes
the A of each of them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.lm.hugging_face.files import (
    ADAPTER,
    FLOATS,
    WeightsError,
    read_json,
    write_atomically,
    write_json,
)
from jaxrlhf.lm.hugging_face.tensors import entries, tensor_shapes
from jaxrlhf.lm.transformer.config import DecoderConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS: dict[str, Kind] = {"CAUSAL_LM": "policy", "SEQ_CLS": "reward"}
LACKING = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings of PEFT that change what an adapter computes, and are not computed here."""


FindBase = Callable[[Path], Path]


def as_it_is(path: Path) -> Path:
    """Returns the path: the base must be a local directory."""
    return path


class Adapter(NamedTuple):
    """An adapter that has been checked, but for the shapes of its base; no tensor has been read.

    Attributes:
        directory: of the adapter.
        base: of the model under it.
        kind: "reward" for a sequence classifier.
        scalings: for each changed tensor of the base, such as `model.layers.0.self_attn.q_proj.weight`.
        replaced: tensors of the base that the adapter has its own of, such as `score.weight`.
    """

    directory: Path
    base: Path
    kind: Kind
    scalings: dict[str, float]
    replaced: tuple[str, ...]

    def note(self) -> str:
        """Returns a sentence for a plan."""
        own = f", and {', '.join(self.replaced)} in place of the base's" if self.replaced else ""
        return f"The adapter {self.directory} is merged into {self.base}: {len(self.scalings)} matrices{own}."


def is_adapter(directory: Path) -> bool:
    """Returns whether a directory holds an adapter, and no model beside it."""
    return (directory / ADAPTER).is_file() and not (directory / "config.json").is_file()


def open_adapter(directory: Path, find_base: FindBase = as_it_is) -> Adapter:
    """Returns the adapter of a PEFT directory.

    Args:
        directory: of the adapter.
        find_base: from what the adapter names its base to a local directory, such as a download.

    Raises:
        WeightsError: it is no LoRA adapter that can be merged here, its file is missing or damaged, or its base is not
            a local directory.
    """
    settings, source = read_json(directory, ADAPTER), directory / ADAPTER
    _check_settings(settings, source)
    kind = TASKS.get(str(settings.get("task_type") or "CAUSAL_LM"))
    if kind is None:
        raise WeightsError(f"{source} is for the task {settings['task_type']!r}: give one for {' or '.join(TASKS)}.")
    with _opened(directory) as file:
        names = list(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in names if name.endswith(".lora_A.weight")}
    for name, shape in shapes.items():
        if len(shape) != 2 or not shape[0]:
            raise WeightsError(f"{directory} has {name} of the shape {tuple(shape)}: copy or save it again.")
    ranks = {name: shape[0] for name, shape in shapes.items()}
    scalings, replaced = {}, []
    for name in names:
        if not name.startswith(PREFIX) or "lora_embedding" in name or "lora_magnitude" in name:
            raise WeightsError(f"{directory} has the tensor {name}, which cannot be merged here: use plain LoRA.")
        module, lora, part = name.removeprefix(PREFIX).partition(".lora_")
        if not lora:
            replaced.append(name.removeprefix(PREFIX))
        elif part == "A.weight":
            if f"{PREFIX}{module}.lora_B.weight" not in names:
                raise WeightsError(f"{directory} has {name} and no lora_B to it: copy or save it again.")
            scalings[f"{module}.weight"] = _scaling(settings, module, ranks[name], source)
        elif part != "B.weight" or f"{PREFIX}{module}.lora_A.weight" not in names:
            raise WeightsError(f"{directory} has {name} alone, which cannot be merged: copy or save it again.")
    return Adapter(directory, _base_of(settings, directory, find_base), kind, scalings, tuple(replaced))


def check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], family: str) -> None:
    """Checks the adapter's tensors against those of its base, before any is read.

    Args:
        adapter: of `open_adapter`.
        shapes: of the base's tensors.
        family: of the base; GPT-2's matrices are `[in, out]`.

    Raises:
        WeightsError: it changes what the base does not have, or in other shapes.
    """
    with _opened(adapter.directory) as file:
        for name in (*adapter.scalings, *adapter.replaced):
            if name not in shapes:
                raise WeightsError(
                    f"{adapter.directory} changes {name}, which its base {adapter.base} does not have: name the base that "
                    f"it was trained on as base_model_name_or_path in {ADAPTER}."
                )
        for name in adapter.replaced:
            _check_shape(adapter, file, PREFIX + name, shapes[name])
        for name in adapter.scalings:
            outputs, inputs = reversed(shapes[name]) if family == "gpt2" else shapes[name]
            down, up = _factor_names(name)
            rank = file.get_slice(down).get_shape()[0]
            _check_shape(adapter, file, down, (rank, inputs))
            _check_shape(adapter, file, up, (outputs, rank))


def merge_adapter(adapter: Adapter, tensors: dict[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    """Returns the base's tensors with the adapter merged, computed in float32; the adapter has been checked."""
    merged = dict(tensors)
    with _opened(adapter.directory) as file:
        for name in adapter.replaced:
            merged[name] = file.get_tensor(PREFIX + name)
        for name, scaling in adapter.scalings.items():
            down, up = (file.get_tensor(part).astype(np.float32) for part in _factor_names(name))
            change = np.float32(scaling) * (up @ down)
            merged[name] = tensors[name].astype(np.float32) + (change.T if family == "gpt2" else change)
    return merged


def maps_of(config: DecoderConfig, kind: Kind, modules: Sequence[str]) -> set[tuple[str, ...]]:
    """Returns the linear maps of a layer that are named as PEFT's `target_modules` names them, for `lora.init_adapter`.

    Args:
        config: of the base.
        kind: of the base.
        modules: ends of the checkpoint's names, such as `q_proj` or `self_attn.q_proj`.

    Raises:
        WeightsError: a name fits no module, or one of several that are one map here without the others.
    """
    maps, fitting = set(), set()
    every: set[str] = set()
    for entry in entries(config, kind):
        if entry.path[:2] != ("layers", "0") or entry.path[-1] != "weight" or "norm" in entry.path[-2]:
            continue
        names = [name.removesuffix(".weight") for name in entry.sources]
        named = [{each for each in modules if name == each or name.endswith(f".{each}")} for name in names]
        every |= {name.rpartition(".")[2] for name in names}
        fitting |= set().union(*named)
        if any(named) and not all(named):
            together = ", ".join(name.rpartition(".")[2] for name in names)
            raise WeightsError(f"{together} are one map here, with one adapter: name all of them, or none.")
        if all(named):
            maps.add(entry.path[2:-1])
    for module in modules:
        if module not in fitting:
            raise WeightsError(
                f"This model has no module {module!r} for an adapter; it has {', '.join(sorted(every))}."
            )
    return maps


def save_adapter(
    directory: Path,
    config: DecoderConfig,
    adapter: dict,
    base: str,
    *,
    revision: str | None = None,
    head: np.ndarray | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> None:
    """Writes an adapter of `lm.lora` as a PEFT directory.

    Args:
        directory: created if it does not exist.
        config: of the base.
        adapter: `{"layers": ...}`, as `lora.init_adapter` makes it.
        base: path or name of the base.
        revision: of a base that is named.
        head: of a reward model, `[D]`.
        scaling: alpha over the rank, of `lora.scaled`.
        dropout: with which it was trained, for whoever trains it further.
    """
    kind: Kind = "policy" if head is None else "reward"
    tensors: dict[str, np.ndarray] = {}
    modules, rank = set(), 0
    every = {name.removesuffix(".weight") for name in tensor_shapes(config, kind)}
    for entry in entries(config, kind):
        if entry.path[0] != "layers" or entry.path[-1] != "weight":
            continue
        factors: Any = adapter["layers"]
        for key in entry.path[2:-1]:
            factors = factors.get(key, {})
        if "down" not in factors:
            continue
        layer = int(entry.path[1])
        down, ups = np.asarray(factors["down"][layer]), entry.split(np.asarray(factors["up"][layer]))
        for name, up in zip(entry.sources, ups, strict=True):
            names = _factor_names(name)
            tensors |= {names[0]: down.T, names[1]: up.T if config.family == "gpt2" else up}
            modules.add(name.removesuffix(".weight"))
        rank = down.shape[1]
    if head is not None:
        tensors[f"{PREFIX}score.weight"] = np.asarray(head)[None]
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_atomically(directory / ADAPTER_WEIGHTS, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))
    settings = {
        "peft_type": "LORA",
        "task_type": next(task for task, of in TASKS.items() if of == kind),
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": _whole(scaling * rank),
        "lora_dropout": dropout,
        "target_modules": _named(modules, every),
        "modules_to_save": None if head is None else ["score"],
        "fan_in_fan_out": config.family == "gpt2",
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    write_json(directory, ADAPTER, settings)


def _named(modules: set[str], every: set[str]) -> list[str]:
    """Returns the ends of names that fit these modules and no others: GPT-2 has two of the name c_proj in a layer."""
    ends = {name: name.rpartition(".")[2] for name in every}
    others = {ends[name] for name in every - modules}
    return sorted({".".join(name.split(".")[-2:]) if ends[name] in others else ends[name] for name in modules})


def _whole(number: float) -> float | int:
    return round(number) if math.isclose(number, round(number)) else number


def _check_settings(settings: dict[str, Any], source: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise WeightsError(f"{source} is of the type {settings.get('peft_type')!r}: only LORA can be merged here.")
    for name in LACKING:
        if settings.get(name):
            raise WeightsError(f"{source} sets {name}, which is not supported: use plain LoRA, or merge it with PEFT.")
    if settings.get("bias", "none") != "none":
        raise WeightsError(f"{source} sets bias to {settings['bias']!r}, which is not supported: merge it with PEFT.")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start != "gaussian":
        raise WeightsError(
            f"{source} sets init_lora_weights to {start!r}, which changes the base: convert it to plain LoRA with PEFT."
        )


def _scaling(settings: dict[str, Any], module: str, rank: int, source: Path) -> float:
    """Returns alpha / rank, or with rslora alpha / sqrt(rank), as PEFT chooses alpha for a module."""
    alpha, patterns = settings.get("lora_alpha", 8), settings.get("alpha_pattern") or {}
    try:
        alpha = next((own for key, own in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), alpha)
    except (AttributeError, re.error) as error:
        raise WeightsError(f"{source} has an alpha_pattern that cannot be read ({error}): save it again.") from None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise WeightsError(f"{source} gives {module} the lora_alpha {alpha!r}, which is no number: write one.")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _base_of(settings: dict[str, Any], directory: Path, find_base: FindBase) -> Path:
    name = settings.get("base_model_name_or_path")
    if name:
        revision = f"@{settings['revision']}" if settings.get("revision") else ""
        for found in (as_it_is, lambda path: directory / path, lambda path: find_base(Path(f"{path}{revision}"))):
            base = found(Path(str(name)))
            if (base / "config.json").is_file():
                return base
    raise WeightsError(
        f"{directory} is an adapter of {name}, which is not a local directory of a model: write the base's path as "
        f"base_model_name_or_path into {directory / ADAPTER}."
    )


def _opened(directory: Path) -> Any:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        reason = "has a pickled adapter only, and reading a pickle can run any code" if pickled else "has none"
        raise WeightsError(f"{directory} should hold {ADAPTER_WEIGHTS} and {reason}: save it as safetensors.")
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged or cut short ({error}): copy or save it again.") from error


def _factor_names(name: str) -> tuple[str, str]:
    module = PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _check_shape(adapter: Adapter, file: Any, name: str, shape: tuple[int, ...]) -> None:
    view = file.get_slice(name)
    found, dtype = tuple(view.get_shape()), view.get_dtype()
    if found != shape or dtype not in FLOATS:
        raise WeightsError(
            f"{name} in {adapter.directory} has shape {found} of {dtype} where its base {adapter.base} asks for {shape}: "
            f"name the base that it was trained on as base_model_name_or_path in {ADAPTER}."
        )
