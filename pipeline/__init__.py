"""Train visual-search models whose next generation searches the old gallery."""
