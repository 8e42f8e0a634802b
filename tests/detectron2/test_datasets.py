"""What ranks compare of detectron2's datasets, before it reads them."""

from __future__ import annotations

import pytest

from d2scale.config.defaults import get_cfg


@pytest.fixture
def files(tmp_path):
    """Annotation files of three datasets: a config's own, one of detectron2's, and one unread."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    paths = {name: tmp_path / f"{name}.json" for name in ("theirs", "ours", "lost")}
    for name in ("theirs", "ours"):
        paths[name].write_text(name)
    for name in ("theirs", "lost"):
        register_coco_instances(name, {}, str(paths[name]), str(tmp_path))
    DatasetCatalog.register("made", list)
    MetadataCatalog.get("made").evaluator_type = "coco"
    yield paths
    for name in ("theirs", "lost", "made"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def digests_of(cfg):
    from d2scale.detectron2.datasets import annotation_digests

    return annotation_digests(cfg)


def test_the_annotations_of_all_datasets_are_told(files, tmp_path):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("theirs", "ours", "made"), ("lost",)
    own = cfg.D2GO_DATA.DATASETS.COCO_INJECTION
    own.NAMES, own.IM_DIRS, own.JSON_FILES = ["ours"], [str(tmp_path)], [str(files["ours"])]
    before = digests_of(cfg)
    assert set(before) == {"annotations of theirs (digest)", "annotations of ours (digest)"}
    files["theirs"].write_text("other")
    changed = [key for key, digest in digests_of(cfg).items() if digest != before[key]]
    assert changed == ["annotations of theirs (digest)"]


def test_those_of_a_lazy_config_too(files):
    from omegaconf import OmegaConf

    parts = {"train": {"dataset": {"names": "theirs"}}, "test": {"dataset": {"names": ["lost"]}}}
    cfg = OmegaConf.create({"dataloader": parts})
    assert set(digests_of(cfg)) == {"annotations of theirs (digest)"}
