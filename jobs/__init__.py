"""Thin entry points: they parse arguments and call the library."""
