"""The run config: what `configs/*.yaml` say, checked, completed, and comparable by digest.

Each section's model stands beside what it configures; this file joins them, and reads YAML and command-line overrides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml
from pydantic import Field, field_validator, model_validator

from pipeline.compat.methods import CompatConfig
from pipeline.compat.methods.bct import Bct
from pipeline.data.order import OrderConfig
from pipeline.data.packing import PackConfig
from pipeline.data.preprocess import AugmentConfig, PreprocessConfig
from pipeline.data.store import is_remote
from pipeline.data.store_remote import StoreConfig
from pipeline.data.typefaces import TypefaceConfig
from pipeline.data.verify import Digests
from pipeline.errors import ConfigError
from pipeline.evaluation.compatibility import EvaluationConfig
from pipeline.mistakes import mistakes
from pipeline.model.backbones import BackboneConfig
from pipeline.model.classifier import ClassifierConfig
from pipeline.model.margins import MarginConfig
from pipeline.redaction import in_short, redacted, without_secret
from pipeline.schema import Config
from pipeline.tracking.store import TrackingConfig
from pipeline.training.trainer import TrainingConfig
from pipeline.workers.config import ClusterConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def default_home() -> Path:
    """Where data, runs and the MLflow store live: BCT_HOME, else the folder that holds the virtual environment.

    A job that Ray starts runs in a copy of the checkout, which is gone tomorrow; its interpreter is not.
    """
    if home := os.environ.get("BCT_HOME"):
        return Path(home).expanduser().absolute()
    return Path(sys.prefix).absolute().parent if sys.prefix != sys.base_prefix else Path.home() / "bct"


class DataConfig(Config):
    """Where the shards are, and how they are made where they are missing."""

    train: str = Field(
        "data/train",
        description="folder of the training shards, relative to home, or a URL (s3://, gs://, https://) without keys",
    )
    test: Path | None = Field(Path("data/test"), description="folder of the held-out shards; none: no evaluation")
    validation: Path | None = Field(
        None, description="folder of the shards on which methods and weights are chosen; none: nothing is chosen"
    )
    source: Literal["typefaces", "none"] = Field(
        "none", description="typefaces: fetch, render and pack them where missing; none: the shards must be there"
    )
    typefaces: TypefaceConfig = TypefaceConfig()
    pack: PackConfig = PackConfig()
    order: OrderConfig = OrderConfig()
    quarantine_limit: int = Field(
        100, ge=0, description="samples that may turn out not to decode, and are replaced, before the run gives up"
    )
    verify: Digests = Field(
        "all", description="when every shard's sha256 is compared: before training, in the background, or not at all"
    )
    store: StoreConfig = StoreConfig()

    @field_validator("train")
    @classmethod
    def _train_has_no_secret(cls, train: str) -> str:
        return without_secret(train)


class GenerationConfig(Config):
    """One generation: what it is, what it learns from, and what it must stay compatible with."""

    identities: int | None = Field(None, ge=2, description="how many of the data set's identities; none: all of them")
    parents: tuple[str, ...] = Field((), description="older generations whose galleries it must search")
    paragon_of: str | None = Field(None, description="the generation whose update gain this one is the yardstick of")
    backbone: BackboneConfig = BackboneConfig()
    margin: MarginConfig = MarginConfig(name="cosface", scale=20.0, m3=0.2)
    compat: CompatConfig = Bct()
    classifier: ClassifierConfig = ClassifierConfig()
    augment: AugmentConfig = AugmentConfig()
    training: TrainingConfig = TrainingConfig()
    seed: int = Field(0, ge=0, lt=2**31, description="of initial weights, order and augmentation")

    @model_validator(mode="after")
    def _parents_fit_the_method(self) -> Self:
        method = self.compat.method
        if self.parents and not self.compat.takes_parents:
            raise ValueError(f"compat.method {method!r} takes no parents; remove them or choose 'bct'")
        if self.compat.starts_from_parent and len(self.parents) != 1:
            raise ValueError(f"compat.method {method!r} needs exactly one parent, whose weights it starts from")
        if self.classifier.start not in (None, *self.parents):
            raise ValueError(f"classifier.start {self.classifier.start!r} is none of the generation's parents")
        return self

    @property
    def bound_to_workers(self) -> str | None:
        """Which of its keys lets the number of processes shape the result, or forbids another one."""
        if self.compat.compares_samples:
            return f"compat.method {self.compat.method!r} compares the samples of a micro-batch"
        if self.classifier.fused_update:
            return "classifier.fused_update leaves no room for accumulation"
        return "classifier.shard_ranks must divide it" if self.classifier.shard_ranks not in (None, 1) else None


class RunConfig(Config):
    """One run: a data set, a family of generations in the order of their training, and their evaluation."""

    name: str = Field(pattern=NAME, description="of the run and its family: MLflow experiment and registered model")
    home: Path = Field(default_factory=default_home, description="absolute folder of data, runs and MLflow's store")
    seed: int = Field(0, ge=0, lt=2**31, description="of the choice of identities")
    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    generations: dict[str, GenerationConfig] = Field(min_length=1, description="by name, oldest first")
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("home")
    @classmethod
    def _home_is_absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @model_validator(mode="after")
    def _generations_fit_together(self) -> Self:
        names = list(self.generations)
        for name, generation in self.generations.items():
            backbone, preprocess = generation.backbone, self.preprocess
            if (backbone.image_size, backbone.channels) != (preprocess.size, preprocess.channels):
                raise ValueError(
                    f"generations.{name}.backbone takes {backbone.image_size} px images of {backbone.channels} "
                    f"channels, but preprocess gives {preprocess.size} px of {preprocess.channels}"
                )
            if name in generation.parents:
                raise ValueError(f"generations.{name}.parents names itself")
            if later := set(generation.parents) & set(names[names.index(name) + 1 :]):
                raise ValueError(f"generations.{name}.parents names {later.pop()!r}, which is trained after it")
            if generation.paragon_of is not None and generation.paragon_of not in self.generations:
                raise ValueError(
                    f"generations.{name}.paragon_of names {generation.paragon_of!r}, which is not in this run"
                )
            if self.cluster.workers > generation.training.global_batch:
                raise ValueError(
                    f"generations.{name}.training.global_batch is {generation.training.global_batch}, "
                    f"less than one sample for each of {self.cluster.workers} workers"
                )
            if self.cluster.fewest < self.cluster.workers and (reason := generation.bound_to_workers):
                raise ValueError(f"cluster.min_workers changes the number of workers, but generations.{name}.{reason}")
        return self

    @property
    def folder(self) -> Path:
        """Of everything that this run writes."""
        return self.home / "runs" / self.name

    @property
    def train_location(self) -> str:
        """Absolute folder of the training shards, or their URL."""
        return self.data.train if is_remote(self.data.train) else str(self.home / self.data.train)

    def checkpoints(self, name: str) -> str:
        """Absolute folder, or URL, of the checkpoints of generation `name`."""
        location = self.generations[name].training.checkpoints.location
        own = str(self.folder / "training" / name / "checkpoints")
        return own if location is None else f"{location.rstrip('/')}/{self.name}/{name}"

    def to_yaml(self) -> str:
        """The resolved config, as it could be written to a file."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def shaping(self, name: str) -> dict[str, Any]:
        """All that shapes generation `name`, as plain JSON: two runs that agree in it train the same model."""
        generation = self.generations[name].model_dump(mode="json", exclude={"paragon_of"})
        generation["training"].pop("checkpoints")
        for seen in ("log_every", "observe", "profile"):
            generation["training"].pop(seen)
        guards = generation["training"].pop("guards")
        if guards["rewind"]:  # the others end a run, or let it go on, but do not change it
            generation["training"]["rewind"] = {key: guards[key] for key in ("spike_factor", "rewind_limit")}
        order = self.data.order.model_dump(mode="json")
        return {
            **generation,
            "subset_seed": self.seed,
            "preprocess": self.preprocess.model_dump(mode="json"),
            "order": order,
        }


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two JSON objects differ, with both values."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        path, left, right = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += differing_keys(left, right, f"{path}.")
        elif left != right:
            lines.append(f"{path} (was {left!r}, now {right!r})")
    return lines


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key.sub=value` overrides, each value read as YAML.

    `defaults`, beside `generations`, is merged under each of them.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, or a value is out of range.
    """
    return load_tree(read_yaml(path, overrides), path)


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file's mapping, with overrides.

    Raises:
        ConfigError: the file is missing or no YAML, or an override is none.
    """
    try:
        tree = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"config file {path} is missing") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config file {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds no mapping of keys to values")
    for override in overrides:
        _apply(tree, override)
    return tree


def load_tree(tree: dict[str, Any], path: Path) -> RunConfig:
    """The run config of a mapping that was read from `path`.

    Raises:
        ConfigError: a key is unknown, or a value is out of range.
    """
    defaults = tree.pop("defaults", None) or {}
    if isinstance(generations := tree.get("generations"), dict):
        tree["generations"] = {name: merge(defaults, own or {}) for name, own in generations.items()}
    try:
        return RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(mistakes(error, RunConfig))}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {redacted(override)!r} is not of the form key.sub=value")
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        if not isinstance(node.setdefault(part, {}), dict):
            raise ConfigError(f"override {redacted(override)!r}: {part} holds a value, not a section")
        node = node[part]
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"override {redacted(override)!r}: its value is no YAML: {in_short(error)}") from None


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, section by section."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
