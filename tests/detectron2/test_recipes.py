"""Every recipe that comes with detectron2 plans."""

from pathlib import Path

import pytest
from recipes import plan_recipe, recipe_files

from d2scale.errors import ConfigError


def zoo():
    import detectron2.model_zoo

    return Path(detectron2.model_zoo.__file__).parent / "configs"


def test_every_recipe_of_the_model_zoo_plans_but_one_without_a_total_batch():
    refused = []
    paths = list(recipe_files(str(zoo())))
    for path in paths:
        try:
            plan_recipe(path)
        except ConfigError as error:
            refused.append((Path(path).name, str(error)))
    assert len(paths) > 100
    # A classifier with torchvision's loader.
    assert [name for name, _ in refused] == ["torchvision_imagenet_R_50.py"]


@pytest.mark.parametrize("text", ["_BASE_: detectron2://Base-RetinaNet.yaml\n"])
def test_an_address_of_detectron2_opens_as_a_base(write_config, text):
    assert plan_recipe(write_config(text)).ims_per_batch == 16
