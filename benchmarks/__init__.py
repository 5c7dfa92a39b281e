"""Timings beside other libraries, and plans for machines that are not at hand."""
