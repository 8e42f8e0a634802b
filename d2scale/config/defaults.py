"""Every config key that d2scale itself reads, with its default."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from d2scale.config.projects import entry_points

_QAT_ITERATIONS = {
    "START_ITER": 35000,
    "ENABLE_OBSERVER_ITER": 35000,
    "ENABLE_LEARNABLE_OBSERVER_ITER": 36000,
    "FREEZE_BN_ITER": 37000,
    "DISABLE_OBSERVER_ITER": 38000,
}
QAT_ITERATION_KEYS = tuple(_QAT_ITERATIONS)

# detectron2 reads None as SOLVER.WEIGHT_DECAY.
NUMBERS_OR_NONE = ("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS")


def add_d2scale_config(cfg: CfgNode) -> None:
    """Add the ``D2SCALE`` keys to ``cfg``, in place. Works on any engine's node type."""
    node = type(cfg)
    cfg.D2SCALE = node()
    # How the learning rate follows the batch ratio: auto, linear, sqrt, none or gain (by what a
    # step is worth, measured while training). auto is sqrt for Adam-like optimizers; for SGD it is
    # gain for a larger batch by the method max_memory, and else linear.
    cfg.D2SCALE.LR_RULE = "auto"
    # By the gain rule: images in a step of the recipe whose iterations this config counts, as the
    # plan of a run sets it. 0: SOLVER.IMS_PER_BATCH.
    cfg.D2SCALE.RECIPE_IMS_PER_BATCH = 0
    cfg.D2SCALE.IMS_PER_GPU = 0  # in one forward and backward of one GPU; 0: from the memory
    cfg.D2SCALE.MAX_IMS_PER_BATCH = 0  # limit of the batch that d2scale_max_memory chooses; 0: none
    # Micro-batches in one optimizer step. 0: decide from IMS_PER_GPU and the memory.
    cfg.D2SCALE.ACCUMULATION_STEPS = 0
    # Run the recipe's ranks in turn on fewer GPUs, each with its own images, random numbers and
    # state: the cluster's step for any model. "auto": with keep_total, for models that do not tell
    # their loss normalizers. "on", "off".
    cfg.D2SCALE.VIRTUAL_RANKS = "auto"
    # Let batch norm take its statistics from the images of all GPUs at once. "auto": where it
    # trains with fewer than 8 images in a forward of a GPU, or the recipe's does so, but not with
    # virtual ranks. "on", "off".
    cfg.D2SCALE.SYNC_BN = "auto"
    # Add the gradients of virtual ranks in their order: the same bits on any number of GPUs, for
    # a copy of the gradients for each virtual rank of a GPU, and a broadcast for each.
    cfg.D2SCALE.ORDERED_SUM = False
    # Make every step independent of the number of ranks and micro-batches, to rounding.
    cfg.D2SCALE.EXACT = False
    # Compute activations again in the backward pass instead of keeping them: less memory, more
    # time. Only the default engine honours it.
    cfg.D2SCALE.ACTIVATION_CHECKPOINTING = False
    _run_keys(cfg.D2SCALE)
    cfg.D2SCALE.TILES = _tile_keys(node())
    cfg.D2SCALE.MEMORY = _memory_keys(node())


def _run_keys(options: Any) -> None:
    """How a run meets what goes wrong."""
    # What an out-of-memory error does to a run. "split": the step is undone and taken again in
    # smaller micro-batches, with the same result; after a while larger ones are tried again.
    # "stay_split": they stay smaller. "raise": the run ends.
    options.ON_OOM = "split"
    # Seconds for which the default engine waits for its loader's workers; then the run ends.
    options.LOADER_TIMEOUT_SECONDS = 600.0
    # Let --resume go on with a recipe that is not the one the training was started with.
    options.ALLOW_CHANGED_RECIPE = False


def _tile_keys(tiles: Any) -> Any:
    """How larger images are evaluated and drawn: in tiles, each resized as an image is."""
    # Edge of a tile, in pixels of the original image; 0: no tiles. Only the default engine
    # honours it.
    tiles.SIZE = 0
    tiles.OVERLAP = 0.2  # of two neighbours, at least, as a share of the edge
    # Look at the whole image too, for objects that are larger than the overlap.
    tiles.WHOLE_IMAGE = True
    return tiles


def _memory_keys(memory: Any) -> Any:
    memory.BUDGET_GIB = 0.0  # device memory that training may take; 0: all of it
    # Share of the budget that a prediction may fill. What was measured may fill all of it.
    memory.FRACTION = 0.95
    memory.PROFILE = ""  # memory profile file; empty: none
    # Let d2scale_max_memory measure on the device before training, where there is one and
    # neither IMS_PER_GPU nor PROFILE is given. False: predict.
    memory.PROBE = True
    return memory


def add_project_configs(cfg: Any) -> tuple[str, ...]:
    """Add the config keys of every installed project to ``cfg``, in place.

    A project offers a function as an entry point of the group ``d2scale.configs``. It adds the
    project's keys, and returns those keys and sections whose values say nothing about the memory
    of training. Returned are those of all projects::

        def add_my_config(cfg):
            cfg.MODEL.MY_HEAD = type(cfg)({"NUM_CONVS": 4, "CENTER_RADIUS": 1.5})
            return ("MODEL.MY_HEAD.CENTER_RADIUS",)
    """
    entries = entry_points(group="d2scale.configs")
    return tuple(key for entry in entries for key in entry.load()(cfg) or ())


def get_cfg() -> CfgNode:
    """Return a fresh config: the keys of a recipe that d2scale and its default engine read."""
    cfg = CfgNode(_RECIPE)  # copies it
    add_d2scale_config(cfg)
    return cfg


# d2go's defaults (detectron2's where d2go adds none): a recipe that leaves a key out means those.
_RECIPE: dict[str, Any] = {
    "VERSION": 2,
    "OUTPUT_DIR": "./output",
    "SEED": -1,
    "WRITER_PERIOD": 20,
    "SOLVER": {
        # 0, or left out: 8, d2go's default, or fewer if the batch is no multiple of that.
        "REFERENCE_WORLD_SIZE": 0,
        "IMS_PER_BATCH": 16,
        "BASE_LR": 0.001,
        "BASE_LR_END": 0.0,
        "MAX_ITER": 40000,
        "STEPS": (30000,),
        "WARMUP_ITERS": 1000,
        "CHECKPOINT_PERIOD": 5000,
        "OPTIMIZER": "sgd",
        # Names of scaling methods; at most one may scale the batch.
        "AUTO_SCALING_METHODS": (),
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "GAMMA": 0.1,
        "WARMUP_FACTOR": 0.001,
        "WARMUP_METHOD": "linear",
        "RESCALE_INTERVAL": False,
        "MOMENTUM": 0.9,
        "NESTEROV": False,
        "BETAS": (0.9, 0.999),
        "EPS": 1e-8,
        "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_NORM": 0.0,
        "WEIGHT_DECAY_BIAS": None,
        "BIAS_LR_FACTOR": 1.0,
        "CLIP_GRADIENTS": {
            "ENABLED": False,
            "CLIP_TYPE": "value",
            "CLIP_VALUE": 1.0,
            "NORM_TYPE": 2.0,
        },
        "AMP": {"ENABLED": False, "PRECISION": "float16"},
    },
    "TEST": {
        "EVAL_PERIOD": 0,
        "DETECTIONS_PER_IMAGE": 100,
        "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
    },
    "QUANTIZATION": {
        "QAT": {
            "ENABLED": False,
            **_QAT_ITERATIONS,
            "UPDATE_OBSERVER_STATS_PERIODICALLY": False,
            "UPDATE_OBSERVER_STATS_PERIOD": 1,
        }
    },
    "MODEL_EMA": {"ENABLED": False, "DECAY": 0.999},
    "DATASETS": {"TRAIN": (), "TEST": ()},
    # COCO-format datasets that the config brings along: names, folders of images, annotation files.
    "D2GO_DATA": {
        "DATASETS": {"COCO_INJECTION": {"NAMES": [], "IM_DIRS": [], "JSON_FILES": []}},
    },
    "DATALOADER": {
        "NUM_WORKERS": 4,
        "ASPECT_RATIO_GROUPING": True,
        "FILTER_EMPTY_ANNOTATIONS": True,
        "SAMPLER_TRAIN": "TrainingSampler",
    },
    "INPUT": {
        "FORMAT": "BGR",
        "MIN_SIZE_TRAIN": (800,),
        "MIN_SIZE_TRAIN_SAMPLING": "choice",
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        "RANDOM_FLIP": "horizontal",
    },
    "MODEL": {
        "DEVICE": "cuda",
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": "",
        "PIXEL_MEAN": [103.53, 116.28, 123.675],
        "PIXEL_STD": [1.0, 1.0, 1.0],
        "DDP_FIND_UNUSED_PARAMETERS": False,
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
        "RESNETS": {
            "DEPTH": 50,
            "OUT_FEATURES": ["res4"],
            "NORM": "FrozenBN",
            "STRIDE_IN_1X1": True,
            "STEM_OUT_CHANNELS": 64,
            "RES2_OUT_CHANNELS": 256,
        },
        "FPN": {"IN_FEATURES": [], "OUT_CHANNELS": 256, "NORM": "", "FUSE_TYPE": "sum"},
        "PROPOSAL_GENERATOR": {"NAME": "RPN"},
    },
}
