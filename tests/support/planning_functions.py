"""Planning in spawned ranks."""

from d2scale.engine import planning
from d2scale.errors import ConfigError
from d2scale.step.ranks import gather_objects, rank
from landscapes import landscapes


def plan_for_devices_of(cfg, device_gibs):
    """The plans, or the errors, of all ranks, whose GPUs have the given memory."""
    planning.load_training_dataset = lambda cfg: landscapes()
    planning.device_of = lambda cfg: rank()
    planning._device_gib = lambda device: device_gibs[device]
    try:
        outcome = planning.plan_on_ranks(cfg, "max_memory", 4000)
    except ConfigError as error:
        outcome = str(error)
    return gather_objects(outcome)
