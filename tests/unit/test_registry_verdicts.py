"""What the registry is told of evaluations, and says of them: tags, verdicts, cards and pictures, in a real store."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.assessment import evaluate_run
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError, RegistryError
from pipeline.registry import Registry
from pipeline.registry_evaluation import record_evaluation
from pipeline.stamp import Stamp
from pipeline.tracking import pages, verdicts
from pipeline.tracking.lineage_picture import Edge, Parents, plot_lineage
from pipeline.tracking.pages import MAX_DESCRIPTION, shortened
from pipeline.tracking.verdicts import Finding, read_findings, read_self_test, verdict_tags
from tests.unit.families import DATA, Family
from tests.unit.test_assessment import config_of, registry_of, write_images
from tests.unit.test_registry import make_generation, start

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def family(registry: Registry, tmp_path: Path) -> Family:
    return Family.make(registry, tmp_path / "artefacts")


def require(family: Family, newer: str, older: str) -> None:
    one, other = (Stamp.of(family.generations[name]) for name in (newer, older))
    family.registry.verdicts().require(one, other)


def test_verdicts_of_an_evaluation_are_read_back(family: Family, client: MlflowClient) -> None:
    with pytest.raises(DataError, match=r"no verdict is recorded"):
        require(family, "v2", "v1")
    family.record(v3_v1=(0.19, 0.13))
    require(family, "v2", "v1")
    require(family, "v3", "v2")
    with pytest.raises(DataError, match=r"incompatible \(rank1 -1.0 \[-2.0, [+-]0.0\], tar@1e-3 \+3.0"):
        require(family, "v3", "v1")
    with pytest.raises(DataError, match=r"no verdict is recorded"):
        require(family, "v1", "v2")  # the older never searches the newer's
    tags = client.get_model_version("glyphs", "3").tags
    digests = {name: generation.digest for name, generation in family.generations.items()}
    held, failed = json.loads(tags["compatible_with"]), json.loads(tags["incompatible_with"])
    difference = {"rank1": [0.05, 0.04, 0.06], "tar@1e-3": [0.03, 0.02, 0.04]}
    assert held == {"v2": {"digest": digests["v2"], "held": True, "differences": difference}}
    assert failed["v1"]["digest"] == digests["v1"]
    assert failed["v1"]["held"] is False
    assert "compatible_with" not in client.get_model_version("glyphs", "1").tags  # it has no ancestor


def test_self_tests_are_recorded_with_their_test_set(family: Family) -> None:
    family.record()
    assert read_self_test(family.registry.versions()["v2"]) == (DATA, {"rank1": 0.30, "tar@1e-3": 0.15})


def test_the_newest_verdict_counts_and_the_others_stay(family: Family) -> None:
    family.record()
    family.record(("v1", "v3"), v3_v1=(0.1, 0.1))
    with pytest.raises(DataError, match=r"incompatible"):
        require(family, "v3", "v1")
    require(family, "v3", "v2")  # not judged this time
    family.record(("v1", "v3"))
    require(family, "v3", "v1")


def test_a_verdict_in_both_tags_refuses(family: Family, client: MlflowClient) -> None:
    """As it is between the two writes."""
    family.record()
    tag = client.get_model_version("glyphs", "2").tags["compatible_with"]
    client.set_model_version_tag("glyphs", "2", "incompatible_with", tag)
    with pytest.raises(DataError, match=r"incompatible"):
        require(family, "v2", "v1")


def test_a_tag_changed_by_hand_is_told(family: Family, client: MlflowClient) -> None:
    client.set_model_version_tag("glyphs", "2", "compatible_with", '["v1"]')
    with pytest.raises(RegistryError, match=r"'compatible_with' of version 2 \('v2'\) cannot be read, .* by hand"):
        family.registry.verdicts()


def test_many_ancestors_stay_within_the_tag(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    one = family.registry.versions()["v3"]
    found = {f"v{n}": Finding(f"{n:064d}", True, {"rank1": (0.012345, 0.01, 0.02)}) for n in range(40)}
    whole = verdict_tags(one, found)["compatible_with"]
    for limit in (len(whole) - 1, len(whole) // 2, 500):
        monkeypatch.setattr(verdicts, "MAX_TAG", limit)
        text = verdict_tags(one, found)["compatible_with"]
        assert len(text) <= limit
        back = read_findings(replace(one, tags={"compatible_with": text}))
        assert list(back)[-1] == "v39"  # the newest
        assert all(back[name].digest == found[name].digest for name in back)
    assert read_findings(replace(one, tags={"compatible_with": whole})) == found


def test_pages_show_card_config_and_picture(family: Family, client: MlflowClient) -> None:
    run_id = family.registry.versions()["v2"].run_id
    names = {entry.path for entry in client.list_artifacts(run_id)}
    assert names >= {"config.yaml", "model-card.md", "lineage.png"}  # from its registration on
    assert "not judged yet" in (client.get_model_version("glyphs", "2").description or "")
    family.record()
    version = client.get_model_version("glyphs", "2")
    assert "**compatible.**" in (version.description or "")
    assert f"models:/{version.tags['model_id']}" in (version.description or "")
    card = Path(client.download_artifacts(run_id, "model-card.md")).read_text()
    assert card == version.description
    assert Path(client.download_artifacts(run_id, "config.yaml")).read_text() == "seed: 1\n"
    picture = Path(client.download_artifacts(run_id, "lineage.png")).read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_an_old_report_is_recorded_where_the_registry_does_not_know_it(
    family: Family, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = family.record()
    drawn: list[str] = []

    def draw(name: str, parents: Parents, edges: Mapping[tuple[str, str], Edge], path: Path) -> None:
        drawn.append(name)
        plot_lineage(name, parents, edges, path)

    monkeypatch.setattr(pages, "plot_lineage", draw)
    record_evaluation(family.registry, family.generations, report, DATA, again=True)
    assert drawn == []
    run_id = family.registry.versions()["v2"].run_id
    client.delete_model_version("glyphs", "2")  # by hand
    with pytest.raises(RegistryError, match=r"'v2' is not registered in .*version was deleted by hand; run the job"):
        family.registry.get("v2")
    assert family.registry.register(run_id, family.generations["v2"], {}).version == "4"
    record_evaluation(family.registry, family.generations, report, DATA, again=True)
    assert sorted(drawn) == ["v1", "v2", "v2", "v3"]  # at its registration, and all anew
    require(family, "v2", "v1")


def test_an_evaluation_from_images_to_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_images(tmp_path / "test")
    shutil.copytree(tmp_path / "test", tmp_path / "validation")
    registry = registry_of(tmp_path)
    v1 = make_generation(tmp_path, "v1")
    v2 = make_generation(tmp_path, "v2", {"v1": v1.digest}, seed=1)
    for generation in (v1, v2):
        registry.register(start(registry, generation.record.name), generation, {})
    config = config_of(tmp_path)
    evaluate_run(config, split="validation")
    assert read_findings(registry.versions()["v2"]) == {}  # methods are chosen on it, generations are not judged
    judged = evaluate_run(config)["criterion"]["v2/v1"]
    found = read_findings(registry.versions()["v2"])["v1"]
    assert (found.digest, found.held) == (v1.digest, judged["held"])
    assert found.differences["rank1"][0] == pytest.approx(judged["differences"]["rank1"]["value"], abs=1e-6)
    data = Manifest.load(tmp_path / "test").digest
    assert (read_self_test(registry.versions()["v1"]) or ("",))[0] == data
    registry.client.delete_model_version_tag("glyphs", "2", "self_test")
    evaluate_run(config)  # the report is there
    assert read_self_test(registry.versions()["v2"]) is not None


def test_a_long_card_is_cut_between_sections() -> None:
    assert shortened("short\n") == "short\n"
    card = "# a\n" + "".join(f"\n## part {n}\n\n{'x' * 900}\n" for n in range(9))
    cut = shortened(card)
    assert len(cut) <= MAX_DESCRIPTION
    assert "x\n\n*Shortened: the whole card is the artefact `model-card.md`" in cut
    assert len(shortened("y" * 9000)) <= MAX_DESCRIPTION
