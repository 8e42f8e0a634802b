"""Every config key that d2scale itself reads, with its default.

The values are d2go's defaults (detectron2's where d2go adds none), because a recipe that leaves
a key out means those.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from d2scale.config.projects import entry_points

QAT_ITERATION_KEYS = (
    "START_ITER",
    "ENABLE_OBSERVER_ITER",
    "ENABLE_LEARNABLE_OBSERVER_ITER",
    "FREEZE_BN_ITER",
    "DISABLE_OBSERVER_ITER",
)

# detectron2 reads None as SOLVER.WEIGHT_DECAY.
NUMBERS_OR_NONE = ("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS")


def add_d2scale_config(cfg: CfgNode) -> None:
    """Add the ``D2SCALE`` keys to ``cfg``, in place. Works on any engine's node type."""
    node = type(cfg)
    cfg.D2SCALE = node()
    # How the learning rate follows the batch ratio: auto, linear, sqrt or none.
    # auto is linear for SGD and sqrt for Adam-like optimizers.
    cfg.D2SCALE.LR_RULE = "auto"
    # Images in one forward and backward of one GPU. 0: decide from the memory.
    cfg.D2SCALE.IMS_PER_GPU = 0
    # Upper limit of the total batch that d2scale_max_memory may choose. 0: no limit.
    cfg.D2SCALE.MAX_IMS_PER_BATCH = 0
    # Micro-batches in one optimizer step. 0: decide from IMS_PER_GPU and the memory.
    cfg.D2SCALE.ACCUMULATION_STEPS = 0
    # What an out-of-memory error does to a run. "split": the step is undone and taken again in
    # smaller micro-batches, with the same result. "raise": the run ends.
    cfg.D2SCALE.ON_OOM = "split"
    # Make every step independent of the number of ranks and micro-batches, to rounding.
    cfg.D2SCALE.EXACT = False
    # Let --resume go on with a recipe that is not the one the training was started with.
    cfg.D2SCALE.ALLOW_CHANGED_RECIPE = False
    # Compute activations again in the backward pass instead of keeping them: less memory, more
    # time. Only the default engine honours it.
    cfg.D2SCALE.ACTIVATION_CHECKPOINTING = False
    cfg.D2SCALE.MEMORY = node()
    # Device memory to plan for, in GiB. 0: what the device has.
    cfg.D2SCALE.MEMORY.BUDGET_GIB = 0.0
    # Share of the budget that a prediction may fill. What was measured may fill all of it.
    cfg.D2SCALE.MEMORY.FRACTION = 0.95
    # Memory profile file. Empty: none.
    cfg.D2SCALE.MEMORY.PROFILE = ""
    # Let d2scale_max_memory measure on the device before training, where there is one and
    # neither IMS_PER_GPU nor PROFILE is given. False: predict.
    cfg.D2SCALE.MEMORY.PROBE = True


def add_project_configs(cfg: Any) -> tuple[str, ...]:
    """Add the config keys of every installed project to ``cfg``, in place.

    A project offers a function as an entry point of the group ``d2scale.configs``. It takes the
    config, adds the project's keys, and returns those keys and sections of keys whose values
    say nothing about the memory of training::

        def add_my_config(cfg):
            cfg.MODEL.MY_HEAD = type(cfg)({"NUM_CONVS": 4, "CENTER_RADIUS": 1.5})
            return ("MODEL.MY_HEAD.CENTER_RADIUS",)

    Returns:
        The keys and sections without influence on memory, of all projects.
    """
    entries = entry_points(group="d2scale.configs")
    return tuple(key for entry in entries for key in entry.load()(cfg) or ())


def get_cfg() -> CfgNode:
    """Return a fresh config: the keys of a recipe that d2scale and its default engine read."""
    cfg = CfgNode()
    cfg.VERSION = 2
    cfg.OUTPUT_DIR = "./output"
    cfg.SEED = -1
    cfg.WRITER_PERIOD = 20
    _add_schedule(cfg)
    _add_solver(cfg)
    _add_data(cfg)
    _add_model(cfg)
    add_d2scale_config(cfg)
    return cfg


def _add_schedule(cfg: CfgNode) -> None:
    cfg.SOLVER = CfgNode()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.BASE_LR = 0.001
    cfg.SOLVER.BASE_LR_END = 0.0
    cfg.SOLVER.MAX_ITER = 40000
    cfg.SOLVER.STEPS = (30000,)
    cfg.SOLVER.WARMUP_ITERS = 1000
    cfg.SOLVER.CHECKPOINT_PERIOD = 5000
    cfg.SOLVER.OPTIMIZER = "sgd"
    # Names of scaling methods; at most one may scale the batch.
    cfg.SOLVER.AUTO_SCALING_METHODS = ()
    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_PERIOD = 0
    cfg.QUANTIZATION = CfgNode()
    cfg.QUANTIZATION.QAT = CfgNode()
    cfg.QUANTIZATION.QAT.ENABLED = False
    values = (35000, 35000, 36000, 37000, 38000)
    for key, value in zip(QAT_ITERATION_KEYS, values, strict=True):
        cfg.QUANTIZATION.QAT[key] = value
    cfg.MODEL_EMA = CfgNode({"ENABLED": False, "DECAY": 0.999})


def _add_solver(cfg: CfgNode) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    cfg.SOLVER.GAMMA = 0.1
    cfg.SOLVER.WARMUP_FACTOR = 0.001
    cfg.SOLVER.WARMUP_METHOD = "linear"
    cfg.SOLVER.RESCALE_INTERVAL = False
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.NESTEROV = False
    cfg.SOLVER.BETAS = (0.9, 0.999)
    cfg.SOLVER.EPS = 1e-8
    cfg.SOLVER.WEIGHT_DECAY = 0.0001
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    cfg.SOLVER.WEIGHT_DECAY_BIAS = None
    cfg.SOLVER.BIAS_LR_FACTOR = 1.0
    cfg.SOLVER.CLIP_GRADIENTS = CfgNode(
        {"ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0}
    )
    cfg.SOLVER.AMP = CfgNode({"ENABLED": False, "PRECISION": "float16"})
    cfg.TEST.DETECTIONS_PER_IMAGE = 100


def _add_data(cfg: CfgNode) -> None:
    cfg.DATASETS = CfgNode({"TRAIN": (), "TEST": ()})
    cfg.DATALOADER = CfgNode()
    cfg.DATALOADER.NUM_WORKERS = 4
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    cfg.INPUT = CfgNode()
    cfg.INPUT.FORMAT = "BGR"
    cfg.INPUT.MIN_SIZE_TRAIN = (800,)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.MAX_SIZE_TRAIN = 1333
    cfg.INPUT.MIN_SIZE_TEST = 800
    cfg.INPUT.MAX_SIZE_TEST = 1333
    cfg.INPUT.RANDOM_FLIP = "horizontal"


def _add_model(cfg: CfgNode) -> None:
    cfg.MODEL = CfgNode()
    cfg.MODEL.DEVICE = "cuda"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    cfg.MODEL.DDP_FIND_UNUSED_PARAMETERS = False
    cfg.MODEL.BACKBONE = CfgNode({"NAME": "build_resnet_backbone", "FREEZE_AT": 2})
    cfg.MODEL.RESNETS = CfgNode(
        {
            "DEPTH": 50,
            "OUT_FEATURES": ["res4"],
            "NORM": "FrozenBN",
            "STRIDE_IN_1X1": True,
            "STEM_OUT_CHANNELS": 64,
            "RES2_OUT_CHANNELS": 256,
        }
    )
    cfg.MODEL.FPN = CfgNode(
        {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": "", "FUSE_TYPE": "sum"}
    )
    cfg.MODEL.PROPOSAL_GENERATOR = CfgNode({"NAME": "RPN"})
