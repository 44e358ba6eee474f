"""Figures as they are saved, so that what is on them can be read without reading pixels."""

from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from pipeline.evaluation import plots


def keep_figures(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Figure]:
    """What a module saves from now on; it is saved none the less."""
    figures: list[Figure] = []
    save = plots.save_figure

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(module, "save_figure", keep)
    return figures
