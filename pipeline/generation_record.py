"""What generation.json holds: the record of a generation."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pipeline.data.preprocess import PreprocessConfig
from pipeline.model.backbones import BackboneConfig
from pipeline.model.maps import MapConfig
from pipeline.model.margins import MarginConfig
from pipeline.schema import Config

# Files and folders are named after them: none of them leads out of where it is looked for.
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class GenerationRecord(Config):
    """What generation.json holds."""

    format: int = Field(1, description="of this record; readers refuse those that they do not know")
    family: Name = Field(description="generations of one family share a registered model")
    name: Name = Field(description="of the generation, unique in its family")
    parents: dict[Name, str] = Field(default_factory=dict, description="digest of each parent, by name")
    backbone: BackboneConfig | None = Field(description="none: only embeddings are left of the model")
    preprocess: PreprocessConfig | None = Field(description="none where the backbone is")
    margin: MarginConfig
    identities: int = Field(gt=0, description="rows of the classifier")
    config: dict[str, object] = Field(description="the resolved config of the training run, or what was imported")
    config_digest: str
    data_digest: str = Field(description="of the manifest of the training data, or of the imported file")
    code_version: str
    training: dict[str, float] = Field(default_factory=dict, description="steps and last losses of the run")
    files: dict[Name, str] = Field(default_factory=dict, description="sha256 of each file beside the record")
    maps: tuple[MapConfig, ...] = Field((), description="between the new space and the parents'")
    dim: int | None = Field(None, gt=0, description="of the embeddings, where no backbone says it")

    @model_validator(mode="after")
    def _has_one_dimension(self) -> Self:
        if not (self.backbone is None) == (self.preprocess is None) == (self.dim is not None):
            raise ValueError("backbone and preprocess are both given, or dim alone is")
        return self

    @property
    def embedding_dim(self) -> int:
        """Values of an embedding."""
        dim = self.dim if self.backbone is None else self.backbone.embedding_dim
        assert dim is not None, "the record is checked"
        return dim

    def told(self) -> dict[str, Any]:
        """What generation.json says.

        It says nothing of maps and of `dim` where there are none: older artefacts keep their digest.
        """
        unsaid = {key for key, given in (("maps", bool(self.maps)), ("dim", self.dim is not None)) if not given}
        return self.model_dump(mode="json", exclude=unsaid)
