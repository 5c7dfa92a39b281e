"""The decoder: `config`, `layers`, `block`, `trunk`, the `model` as pure functions, and its `axes` for sharding."""
