"""Hugging Face directories: `families` and their `settings`, names of `tensors`, `files`, and whole `weights`."""
