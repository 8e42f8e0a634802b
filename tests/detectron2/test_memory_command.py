"""``d2scale memory`` and ``d2scale plan --profile`` on recipes of detectron2."""

import json

from d2scale import cli

RECIPE = """\
_BASE_: detectron2://COCO-Detection/retinanet_R_50_FPN_1x.yaml
MODEL:
  WEIGHTS: ""
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64}
  FPN: {OUT_CHANNELS: 32}
INPUT: {MIN_SIZE_TRAIN: [96, 160], MAX_SIZE_TRAIN: 256}
"""


def test_a_yaml_recipe_with_python_tags_is_predicted_and_planned(
    write_config, dataset, tmp_path, capsys
):
    path = write_config(RECIPE + f"DATASETS: {{TRAIN: [{dataset}]}}\n")
    profile = tmp_path / "profile.json"
    assert cli.main(["memory", path, "-o", str(profile)]) == 0
    captured = capsys.readouterr()
    assert "engine detectron2: MODEL.META_ARCHITECTURE is RetinaNet" in captured.err
    assert "RetinaNet in detectron2, images of 160x213 pixels with 11 instances" in captured.out
    assert json.loads(profile.read_text())["covers"]["engine"] == "detectron2"
    budget = ["--profile", str(profile), "--gpu-memory-gib", "2", "--method", "max_memory"]
    assert cli.main(["plan", path, *budget]) == 0
    assert "as predicted" in capsys.readouterr().out
    assert cli.main(["plan", path, *budget, "MODEL.RESNETS.DEPTH", "34"]) == 2
    assert "MODEL.RESNETS.DEPTH is 34" in capsys.readouterr().err


def test_a_lazy_config_is_predicted_and_planned(dataset, tmp_path, capsys):
    path = "detectron2://COCO-Detection/retinanet_R_50_FPN_1x.py"
    opts = [f"dataloader.train.dataset.names={dataset}", "model.num_classes=3"]
    opts += ["dataloader.train.mapper.augmentations.0.short_edge_length=[96]"]
    profile = tmp_path / "profile.json"
    assert cli.main(["memory", path, "-o", str(profile), *opts]) == 0
    assert "images of 96x128 pixels" in capsys.readouterr().out
    budget = ["--profile", str(profile), "--gpu-memory-gib", "2", "--method", "max_memory"]
    assert cli.main(["plan", path, *budget, *opts]) == 0
    capsys.readouterr()
    assert cli.main(["plan", path, *budget, *opts, "model.num_classes=5"]) == 2
    assert "model.num_classes is 5; allowed: 3" in capsys.readouterr().err


def test_mistakes_are_one_line(write_config, capsys):
    path = write_config(RECIPE + "DATASETS: {TRAIN: [nowhere_2017]}\n")
    assert cli.main(["memory", path]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "DATASETS.TRAIN is 'nowhere_2017'" in line
    assert cli.main(["memory", path, "--explore"]) == 2
    assert "with the default engine" in capsys.readouterr().err
