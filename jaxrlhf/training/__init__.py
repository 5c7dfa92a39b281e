"""jit, shardings and donation; the training loop; checkpoints, metrics and reports of a run."""
