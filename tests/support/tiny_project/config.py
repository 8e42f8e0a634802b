from fvcore.common.config import CfgNode


def add_tiny_config(cfg):
    cfg.MODEL.TINY = CfgNode({"CHANNELS": 4})
