"""Backbones, margins and the classifier sharded over ranks."""
