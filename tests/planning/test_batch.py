import pytest

from d2scale.errors import ConfigError
from plans import plan_of, with_profile


def test_memory_decides_the_micro_batches_of_a_given_total(recipes):
    plan = with_profile(recipes / "experiment-1-baseline.yaml", 1, "keep_total", 8.0)
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.ims_per_batch) == (6, 3, 16)
    assert plan.predicted_peak_gib == 7.0


def test_memory_decides_the_total_of_max_memory(recipes):
    plan = with_profile(recipes / "experiment-1-baseline.yaml", 2, "max_memory", 16.0)
    assert (plan.ims_per_gpu, plan.accumulation_steps, plan.ims_per_batch) == (15, 1, 30)
    assert plan.predicted_peak_gib == 16.0


def test_max_ims_per_batch_caps_and_says_so(recipes):
    path, cap = recipes / "experiment-1-baseline.yaml", ("D2SCALE.MAX_IMS_PER_BATCH", "24")
    plan = with_profile(path, 2, "max_memory", 16.0, cap)
    assert (plan.ims_per_batch, plan.ims_per_gpu) == (24, 12)
    assert any("MAX_IMS_PER_BATCH" in note for note in plan.notes)


def test_accumulation_steps_are_honoured_or_refused(recipes):
    path = recipes / "experiment-1-baseline.yaml"
    four = plan_of(path, 1, "keep_total", ("D2SCALE.ACCUMULATION_STEPS", "4"))
    assert (four.ims_per_gpu, four.accumulation_steps) == (4, 4)
    with pytest.raises(ConfigError, match="at most 16"):
        plan_of(path, 1, "keep_total", ("D2SCALE.ACCUMULATION_STEPS", "17"))
    with pytest.raises(ConfigError, match="at least 2"):
        with_profile(path, 1, "keep_total", 12.0, ("D2SCALE.ACCUMULATION_STEPS", "1"))


def test_max_memory_says_what_is_missing(recipes):
    path = recipes / "experiment-1-baseline.yaml"
    other = ("INPUT.MAX_SIZE_TRAIN", "4000")  # no profile is shipped for it
    with pytest.raises(ConfigError, match=r"--gpu-memory-gib.* and .*--profile"):
        plan_of(path, 2, "max_memory", other)
    with pytest.raises(ConfigError, match=r"or a memory profile \(D2SCALE.MEMORY"):
        plan_of(path, 2, "max_memory", other, budget_gib=16.0)


def test_a_cap_below_the_number_of_gpus_is_refused(recipes):
    cap = ("D2SCALE.MAX_IMS_PER_BATCH", "3", "D2SCALE.IMS_PER_GPU", "2")
    with pytest.raises(ConfigError, match=r"MAX_IMS_PER_BATCH is 3"):
        plan_of(recipes / "experiment-1-baseline.yaml", 4, "max_memory", cap)


def test_as_many_micro_batches_are_taken_as_asked_or_none(recipes):
    path = recipes / "experiment-1-baseline.yaml"

    def micro_batches(steps, *opts, images=5, method="keep_total"):
        batch = ("SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.IMS_PER_BATCH", str(images))
        asked = ("D2SCALE.ACCUMULATION_STEPS", str(steps), *batch, *opts)
        return plan_of(path, 1, method, asked).accumulation_steps

    for steps in (1, 2, 3, 5):
        assert micro_batches(steps) == steps
    with pytest.raises(ConfigError, match=r"ACCUMULATION_STEPS is 4; allowed: 3 or 5 with 5 imag"):
        micro_batches(4)
    # Where a cap leaves fewer images than fit into the memory, too.
    filled = ("D2SCALE.IMS_PER_GPU", "8", "D2SCALE.MAX_IMS_PER_BATCH")
    assert micro_batches(4, *filled, "20", method="max_memory") == 4
    with pytest.raises(ConfigError, match="allowed: 3 or 5 with 5 images"):
        micro_batches(4, *filled, "5", method="max_memory")
