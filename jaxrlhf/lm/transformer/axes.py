"""What the dimensions of a decoder's parameters are called, for `training.sharding`."""

# Of each array by the last names of its path; trailing dimensions, in order.
_NAMES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedding",): ("vocabulary", "width"),
    ("positions",): (None, "width"),
    ("output_head",): ("width", "vocabulary"),
    ("query_key_value", "weight"): ("width", "heads"),
    ("query_key_value", "bias"): ("heads",),
    ("query_key_value", "down"): ("width", None),
    ("query_key_value", "up"): (None, "heads"),
    ("attention_output", "weight"): ("heads", "width"),
    ("attention_output", "bias"): ("width",),
    ("attention_output", "down"): ("heads", None),
    ("attention_output", "up"): (None, "width"),
    ("gate_up", "weight"): ("width", None, "mlp"),
    ("gate_up", "bias"): (None, "mlp"),
    ("gate_up", "down"): ("width", None),
    ("gate_up", "up"): (None, None, "mlp"),
    ("mlp_output", "weight"): ("mlp", "width"),
    ("mlp_output", "bias"): ("width",),
    ("mlp_output", "down"): ("mlp", None),
    ("mlp_output", "up"): (None, "width"),
    ("head",): ("width",),
}


def decoder_names(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Returns the names of an array's dimensions from its path: parameters, adapters, and whatever is shaped like them.

    Optimiser moments end in the same names as their parameters. Arrays of layers have the layers as their first axis, and
    one more axis than a parameter has is that of the lower iterates, which are stacked. Norms are small and not split.
    """
    above = (None,) * ("layers" in path)
    names = next((names for length in (2, 1) if (names := _NAMES.get(path[-length:])) is not None), None)
    if names is None and path[-1:] in (("scale",), ("bias",)):
        names = (None,)
    if names is None or len(shape) < len(above) + len(names):
        return (None,) * len(shape)
    more = len(shape) - len(above) - len(names)
    return (*("iterates",) * min(1, more), *(None,) * (more - 1), *above, *names)
