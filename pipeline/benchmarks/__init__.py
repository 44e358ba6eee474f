"""Measurements that anyone can run: the product beside its alternative, in one process."""
