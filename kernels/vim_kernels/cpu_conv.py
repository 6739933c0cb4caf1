"""Placeholder while the compiled kernel is being written."""
