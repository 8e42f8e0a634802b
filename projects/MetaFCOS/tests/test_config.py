from __future__ import annotations

import subprocess
import sys

from fvcore.common.config import CfgNode

from meta_fcos.config import add_meta_fcos_config


def test_values_that_are_there_already_stay():
    cfg = CfgNode()
    cfg.MODEL = CfgNode({"FCOS": CfgNode({"NUM_CLASSES": 7, "HEAD_NORM": "GN"})})
    add_meta_fcos_config(cfg)
    assert cfg.MODEL.FCOS.NUM_CLASSES == 7
    assert cfg.MODEL.FCOS.HEAD_NORM == "GN"
    assert cfg.MODEL.FCOS.NUM_CLS_CONVS == 4
    before = cfg.clone()
    add_meta_fcos_config(cfg)
    assert cfg == before


def test_the_published_recipe_merges(recipe_cfg, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "MODEL:\n"
        "  BACKBONE: {NAME: build_fcos_resnet_fpn_backbone, FREEZE: False}\n"
        "  META_LEARN: {EPISODIC_LEARNING: False}\n"
        "  TFA: {TRAIN_SHOT: 5}\n"
        "  FCOS: {NUM_CLASSES: 60, BOX_QUALITY: [ctrness]}\n"
    )
    recipe_cfg.merge_from_file(str(recipe))
    assert recipe_cfg.MODEL.TFA.TRAIN_SHOT == 5


def test_keys_and_checks_need_no_torch():
    code = "import sys, meta_fcos.config, meta_fcos.validate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
