"""The edge of the program: jit, shardings and donation; the loop; what a run writes."""
