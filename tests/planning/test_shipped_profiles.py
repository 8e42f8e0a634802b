import json
import subprocess
import sys
import time

import pytest

from d2scale.cli import main
from d2scale.config import load_cfg, load_recipe
from d2scale.engine.memory import predict_profile
from d2scale.planning.coverage import coverage, find_profile, shipped_profiles


@pytest.mark.parametrize("amp", ["False", "True"])
@pytest.mark.parametrize("checkpointing", ["False", "True"])
@pytest.mark.parametrize(
    "name",
    [
        "Meta-FCOS-pretrain",
        "experiment-1-baseline",
        "experiment-2-same-batch",
        "experiment-3-large-batch",
        "experiment-3-exact",
    ],
)
def test_every_published_recipe_has_its_profile(recipes, name, amp, checkpointing):
    opts = ("SOLVER.AMP.ENABLED", amp, "D2SCALE.ACTIVATION_CHECKPOINTING", checkpointing)
    covers = coverage(*load_recipe(str(recipes / f"{name}.yaml"), opts))
    assert find_profile(shipped_profiles(), covers) is not None


def test_the_profile_is_that_of_todays_model():
    name = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"
    shipped = find_profile(shipped_profiles(), coverage(load_cfg(name)))
    today = predict_profile(load_cfg(name))
    for then, now in zip(shipped.points, today.points, strict=True):
        assert now.live_bytes == pytest.approx(then.live_bytes, rel=0.01), (
            "make it anew: d2scale memory d2scale://MetaFCOS/Base-MetaFCOS.yaml --explore "
            "-o projects/MetaFCOS/meta_fcos/memory_profiles/metafcos-r50.json"
        )


def test_the_64_gpu_recipe_is_filled_into_two_gpus_without_torch_in_a_second(recipes):
    code = (
        "import sys; from d2scale.cli import main; status = main(sys.argv[1:]);"
        "loaded = {'torch', 'numpy'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else status)"
    )
    path = str(recipes / "Meta-FCOS-pretrain.yaml")
    options = ["--gpus", "2", "--gpu-memory-gib", "16", "--method", "max_memory"]
    seconds = []
    for _ in range(3):  # the fastest of three: the machine may be busy
        started = time.monotonic()
        command = [sys.executable, "-c", code, "plan", path, *options, "--format", "json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1
    assert json.loads(done.stdout)["ims_per_gpu"] >= 15


def test_memory_writes_a_profile_that_plan_reads(recipes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("d2scale.planning.hardware.shipped_profiles", tuple)
    recipe, target = str(recipes / "small-cpu.yaml"), str(tmp_path / "profile.json")
    assert main(["memory", recipe, "-o", target]) == 0
    assert "needed GiB" in capsys.readouterr().out
    options = ["--gpu-memory-gib", "4", "--method", "max_memory", "--format", "json"]
    assert main(["plan", recipe, *options]) == 2
    assert "--profile" in capsys.readouterr().err
    assert main(["plan", recipe, *options, "--profile", target]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 0 < plan["predicted_peak_gib"] <= 0.95 * 4
    assert plan["ims_per_gpu"] > 16
    other = ["INPUT.MIN_SIZE_TRAIN", "(800,)"]
    assert main(["plan", recipe, *options, "--profile", target, *other]) == 2
    assert "INPUT.MIN_SIZE_TRAIN is 800; allowed: 144" in capsys.readouterr().err


def test_memory_tells_the_faults_of_a_config(recipes, capsys):
    path = str(recipes / "small-cpu.yaml")
    assert main(["memory", path, "SOLVER.OPTIMIZER", "lion", "INPUT.FORMAT", "XYZ"]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 2
    assert printed.out == ""
