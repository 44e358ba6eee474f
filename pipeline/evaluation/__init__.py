"""Metrics, the compatibility matrix and its pictures."""
