"""Planning in spawned ranks."""

from d2scale.engine import planning
from d2scale.errors import ConfigError
from d2scale.step.ranks import gather_objects, rank
from landscapes import landscapes


def plans_for_devices_of(cfg, cases):
    """For each case the plans, or the errors, of all ranks, whose GPUs have the given GiB."""
    planning.load_training_dataset = lambda cfg: landscapes()
    planning.device_of = lambda cfg: rank()
    return [gather_objects(_plan_or_error(cfg, device_gibs)) for device_gibs in cases]


def _plan_or_error(cfg, device_gibs):
    planning._device_gib = lambda device: device_gibs[device]
    planning._generation = lambda cfg: 8
    try:
        return planning.plan_on_ranks(cfg, "max_memory", 4000)
    except ConfigError as error:
        return str(error)
