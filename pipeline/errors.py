"""Errors that a user can mend.

Each message is one line that says what is wrong, where, and what to do. Jobs print it and exit with the
class's `exit_code`, without a traceback. Broken invariants of our own are assertions, never these.
"""


class PipelineError(Exception):
    """A mistake in what the user gave, or a failure of the world around us, told in one line."""

    exit_code = 2


class ConfigError(PipelineError):
    """The run config does not say something that can be run."""


class DataError(PipelineError):
    """A data set is missing, empty, broken or not the one it was."""


class GenerationError(PipelineError):
    """A generation's artefact is missing, changed or not what the config asks for."""


class RegistryError(PipelineError):
    """The tracking server or the model registry does not hold what is needed."""


class PromotionRefusedError(PipelineError):
    """A generation may not serve: it failed gates, each of which was told on a line of its own."""

    exit_code = 3


class TrainingError(PipelineError):
    """A training run cannot go on: its loss is not a number, or its loader fails."""


class ClusterError(PipelineError):
    """Ray, or a worker on it, could not do what was asked."""


class StoppedError(PipelineError):
    """A run ended before its last step without having failed: it was asked to, or its nodes are gone.

    Its checkpoints are whole, and the same command goes on from them.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
