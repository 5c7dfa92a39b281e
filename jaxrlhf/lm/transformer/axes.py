"""Names of the dimensions of a decoder's parameters, for `training.sharding`."""

# By the last names of an array's path: its trailing dimensions, in order.
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
    ("experts", "router"): ("width", None),
    ("experts", "gate_up"): ("width", "experts", None, "mlp"),
    ("experts", "output"): ("experts", "mlp", "width"),
    ("head",): ("width",),
}


def decoder_names(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Returns the names of an array's dimensions from its path: of parameters, adapters, and their optimiser moments.

    The paths of optimiser moments end in the names of their parameters. Arrays of layers have the layers as their first
    axis; one axis more than that stacks the lower iterates. Norms are small and stay replicated.
    """
    stacked = (None,) * ("layers" in path)
    names = next((names for length in (2, 1) if (names := _NAMES.get(path[-length:])) is not None), None)
    if names is None and path[-1:] in (("scale",), ("bias",)):
        names = (None,)
    if names is None or len(shape) < len(stacked) + len(names):
        return (None,) * len(shape)
    extra = len(shape) - len(stacked) - len(names)
    return (*("iterates",) * min(1, extra), *(None,) * (extra - 1), *stacked, *names)
