from __future__ import annotations

import pytest

from d2scale.coco.catalog import dataset_names, dataset_spec
from d2scale.coco.class_count import class_count_faults, count_classes, with_class_count
from d2scale.coco.dataset import load_dataset
from d2scale.config import load_cfg
from d2scale.errors import ConfigError, DataError
from own_data import OwnData, injection

BASE = "_BASE_: d2scale://MetaFCOS/small-cpu.yaml\nDATASETS: {TRAIN: [mine], TEST: [mine]}\n"
KEY = "MODEL.FCOS.NUM_CLASSES"


@pytest.fixture
def data(tmp_path):
    return OwnData(tmp_path)


def test_the_key_that_counts_classes_follows_the_datasets(data, write_config):
    cfg = load_cfg(write_config(BASE + injection(data)))
    assert cfg.MODEL.FCOS.NUM_CLASSES == 0
    assert with_class_count(cfg).MODEL.FCOS.NUM_CLASSES == data.classes == 6
    del data.content["categories"][-2:]
    data.write()
    assert with_class_count(cfg).MODEL.FCOS.NUM_CLASSES == 4
    published = load_cfg("d2scale://MetaFCOS/small-cpu.yaml")
    assert with_class_count(published).MODEL.FCOS.NUM_CLASSES == 60  # without any file
    set_by_user = load_cfg(write_config(BASE + injection(data)), [KEY, "7"])
    assert with_class_count(set_by_user).MODEL.FCOS.NUM_CLASSES == 7
    (fault,) = class_count_faults(set_by_user, KEY, 7, advice="leave it out")
    assert str(fault) == f"{KEY} is 7; allowed: 4, the classes of mine; leave it out"


def test_a_file_that_is_not_there_or_broken_says_nothing(data, write_config):
    cfg = load_cfg(write_config(BASE + injection(data)))
    for spoil in (lambda: data.json_file.write_text("{"), data.json_file.unlink):
        spoil()
        assert count_classes("mine", cfg) is None
        assert with_class_count(cfg) is cfg


def test_two_configs_may_give_one_name_to_different_files(data, tmp_path, write_config):
    other = OwnData(tmp_path / "other", images=2, classes=2)
    cfgs = [load_cfg(write_config(BASE + injection(one))) for one in (data, other)]
    assert [len(load_dataset("mine", cfg=cfg)) for cfg in cfgs] == [6, 2]
    assert [count_classes("mine", cfg) for cfg in cfgs] == [6, 2]
    assert "mine" in dataset_names(cfgs[0])
    assert "mine" not in dataset_names()


def test_a_taken_name_and_missing_files_are_a_line_each(data, write_config):
    taken = load_cfg(write_config(BASE + injection(data, names=["coco_2017_train"])))
    with pytest.raises(
        ConfigError, match=r"NAMES is 'coco_2017_train'; allowed: a name other"
    ) as e:
        dataset_spec("coco_2017_train", cfg=taken)
    assert "\n" not in str(e.value)
    cfg = load_cfg(write_config(BASE + injection(data)))
    data.json_file.unlink()
    with pytest.raises(DataError) as raised:
        load_dataset("mine", key="DATASETS.TRAIN", cfg=cfg)
    assert f"{data.json_file} not found; correct the path" in str(raised.value)
    assert "\n" not in str(raised.value)
