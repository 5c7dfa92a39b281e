"""The decoder: its `config`, `layers`, `trunk`, the `model` as pure functions, and names of its `axes` for sharding."""
