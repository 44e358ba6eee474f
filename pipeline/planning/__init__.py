"""Capacity planning: what a training step takes of a GPU, and the cheapest setting that fits, before any is rented."""
