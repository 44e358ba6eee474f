"""Where a job finds its registry: as a run's config says, or at the default home."""

from __future__ import annotations

from pipeline.config import RunConfig, default_home
from pipeline.registry import Registry, TrackingConfig, tracking_location


def open_registry(config: RunConfig | None, family: str | None = None) -> Registry:
    """The registry of a family.

    Args:
        config: of a run; None: the default home (BCT_HOME), and the environment's tracking URI.
        family: another one than the run's name; needed where there is no config.

    Raises:
        ConfigError: the tracking URI cannot be used.
        RegistryError: the store does not answer, or refuses.
    """
    tracking, home = (config.tracking, config.home) if config else (TrackingConfig(), default_home())
    name = family or (config.name if config else None)
    assert name, "a family, or a config that names it"
    uri, artifact_root = tracking_location(tracking, home)
    return Registry(uri, name, artifact_root)
