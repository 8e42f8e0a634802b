"""The gain rule in d2go's own training: an iteration is a step of the recipe."""

import json

import pytest
import torch

from d2go_commands import META_FCOS, errors

pytestmark = pytest.mark.timeout(900)

METHOD = {"SOLVER.AUTO_SCALING_METHODS": ("d2scale_max_memory",)}
GAIN = {**METHOD, "D2SCALE.LR_RULE": "gain"}
BOUNDS = 1 - 1e-9, 1 + 1e-9


def of_batch(ims_per_batch, **settings):
    """Return settings for a total batch in micro-batches of one image."""
    return {**GAIN, "D2SCALE.ACCUMULATION_STEPS": ims_per_batch, **settings}


@pytest.fixture
def toy():
    import toy_d2go

    return toy_d2go


@pytest.fixture
def scheduled(toy, tmp_path):
    """The recipe's own learning rate at each iteration."""
    plain = tmp_path / "plain"
    toy.train(plain, {"D2SCALE.LR_RULE": "none"})
    return {iteration: line["lr"] for iteration, line in toy.metrics(plain).items()}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def check_rates(lines, scheduled):
    """Assert that lines with steps show the rate r * lr0(tau), and others that of the last step."""
    assert list(lines) == list(range(24))
    steps = 0
    for iteration, line in lines.items():
        if line["steps"] > steps:
            expected = line["gain"] * scheduled[iteration]
        assert line["lr"] == pytest.approx(expected, rel=1e-9)
        assert line["images_seen"] == line["steps"] * lines[0]["images_seen"] / lines[0]["steps"]
        assert "total_loss" in line
        steps = line["steps"]
    return steps


def test_at_the_recipes_batch_nothing_changes(toy, tmp_path):
    expected, _ = toy.train(tmp_path / "plain", {"D2SCALE.LR_RULE": "linear"})
    model, _ = toy.train(tmp_path / "gain", of_batch(4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    assert [line["recipe_steps"] for line in toy.metrics(tmp_path / "gain").values()] == [
        *range(1, 25)
    ]


@pytest.mark.parametrize(("ims_per_batch", "ratio"), [(8, 2.0), (2, 0.5), (32, 8.0)])
def test_rates_and_checkpoints_follow_the_recipes_steps(
    toy, tmp_path, scheduled, ims_per_batch, ratio
):
    out = tmp_path / "out"
    toy.train(out, of_batch(ims_per_batch))
    lines = toy.metrics(out)
    steps = check_rates(lines, scheduled)
    low, high = sorted((1.0, ratio))
    assert all(low * BOUNDS[0] <= line["gain"] <= high * BOUNDS[1] for line in lines.values())
    assert 24 / high <= steps <= 24 / low
    assert (steps < 24) == (ratio > 1)
    # Every iteration ends with at least its own step of the recipe done.
    assert all(line["recipe_steps"] >= iteration + 1 for iteration, line in lines.items())
    saved = [f"model_{iteration:07d}.pth" for iteration in (7, 15, 23)]
    assert sorted(path.name for path in out.glob("model*.pth")) == [*saved, "model_final.pth"]
    assert json.loads((out / "plan.json").read_text())["lr_rule"] == "gain"
    groups = load(out / saved[-1])["optimizer"]["param_groups"]
    momenta = [0.9 ** lines[23]["gain"]] * len(groups)
    assert [group["momentum"] for group in groups] == pytest.approx(momenta)


def test_another_attempt_at_a_step_begins_with_the_schedulers_rate(toy, tmp_path, scheduled):
    out = tmp_path / "out"
    settings = {"D2SCALE.IMS_PER_GPU": 8, "D2SCALE.ACCUMULATION_STEPS": 1}
    # After a single failure it would be taken again as it was.
    toy.train(out, {**GAIN, **settings}, fails_at={2, 3})
    assert json.loads((out / "plan.json").read_text())["ims_per_gpu"] == 4
    check_rates(toy.metrics(out), scheduled)


@pytest.mark.parametrize("stop", range(4, 9))
@pytest.mark.parametrize("ims_per_batch", [12, 2])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    toy, tmp_path, recwarn, ims_per_batch, stop
):
    settings = of_batch(ims_per_batch, **{"SOLVER.CHECKPOINT_PERIOD": 1, "MODEL_EMA.ENABLED": True})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected, _ = toy.train(whole, settings)
    with pytest.raises(StopIteration):
        toy.train(killed, settings, steps=stop)
    # The second to last checkpoint may stand within what the last step was worth.
    *_, second, last = sorted(killed.glob("model_*.pth"))
    last.unlink()
    (killed / "last_checkpoint").write_text(second.name)
    model, _ = toy.train(killed, settings, resume=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    finals = [load(folder / "model_final.pth") for folder in (killed, whole)]
    torch.testing.assert_close(*(final["ema_state"] for final in finals), rtol=0, atol=0)
    clocks = [final["d2scale"]["clock"] for final in finals]
    assert clocks[0] == clocks[1]
    lines = [toy.metrics(folder) for folder in (killed, whole)]
    keys = ("recipe_steps", "steps", "gain", "noise_scale", "images_seen")
    assert list(lines[0]) == list(range(24))
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    # What is left of a large step after its checkpoint shows nothing new.
    for iteration in range(18, 24):
        assert all(lines[0][iteration][key] == lines[1][iteration][key] for key in keys)


def test_a_step_whose_scaled_gradients_overflow_measures_nothing(toy, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-110)
    monkeypatch.setattr("d2go.runner.default_runner.get_grad_scaler", lambda cfg: scaler)
    # d2go's own step would need CUDA.
    monkeypatch.setattr("d2scale.d2go.run_step.D2GoRunStep.obstacle", lambda hook: "")
    amp = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "bfloat16"}
    toy.train(tmp_path / "out", of_batch(8, **amp))
    lines = toy.metrics(tmp_path / "out")
    assert scaler.get_scale() < 2.0**126
    assert lines[0]["gain"] == 1.0
    assert "noise_scale" not in lines[0]
    assert lines[23]["gain"] > 1.0
    assert lines[23]["noise_scale"] > 0


def averaged(rows, decay, *, before_update):
    """Return the average of the weights whose decay takes the power r at each step."""
    average, (*_, before, _), steps = rows[0][4], rows[0], rows[0][0]
    for step, gain, _, weights, _ in rows[1:]:
        if step > steps:
            keep = decay**gain
            average = keep * average + (1 - keep) * (before if before_update else weights)
        before, steps = weights, step
    return average


@pytest.mark.parametrize(("after_backward", "tolerance"), [(False, 0.1), (True, 1e-5)])
def test_the_ema_forgets_by_what_a_step_is_worth(toy, tmp_path, after_backward, tolerance):
    ema = {"ENABLED": True, "AFTER_BACKWARD": after_backward, "DECAY": 0.95}
    settings = {f"MODEL_EMA.{key}": value for key, value in ema.items()}
    schedule = {"SOLVER.MAX_ITER": 100, "SOLVER.STEPS": ()}
    _, rows = toy.train(tmp_path / "out", of_batch(16, **settings, **schedule), noise=5.0)
    steps = rows[-1][0]
    assert 25 <= steps < 60
    weights, average = rows[-1][3:]
    expected = averaged(rows, 0.95, before_update=after_backward)
    distance = torch.dist(rows[0][4], weights)
    assert torch.dist(average, expected) < tolerance * distance
    # With the decay once a step the average would be elsewhere.
    plain = averaged([(*row[:1], 1.0, *row[2:]) for row in rows], 0.95, before_update=False)
    assert torch.dist(average, plain) > 2 * torch.dist(average, expected)


def test_the_time_left_is_told_where_most_iterations_take_no_step(toy, tmp_path):
    out = tmp_path / "out"
    schedule = {"SOLVER.MAX_ITER": 64, "SOLVER.STEPS": ()}
    _, rows = toy.train(out, of_batch(32, **schedule), noise=30.0, seconds_an_image=0.003)
    times, lines = [row[2] for row in rows], toy.metrics(out)
    assert rows[-1][0] < 20  # steps
    for iteration in (20, 40):
        left = times[-1] - times[iteration]
        assert lines[iteration]["eta_seconds"] == pytest.approx(left, rel=0.6)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (of_batch(8), "D2SCALE.LR_RULE is 'gain'; allowed: linear, sqrt or none with the wrapper"),
        ({"D2SCALE.LR_RULE": "gain"}, "none with d2go's own scaling methods; name a d2scale"),
        (of_batch(8, **{"SOLVER.OPTIMIZER": "adam"}), "with SOLVER.OPTIMIZER adam; take sqrt"),
        ({"D2SCALE.LR_RULE": "gain", "SOLVER.OPTIMIZER": "adam"}, "take sqrt"),
    ],
)
def test_where_d2scale_takes_no_steps_the_rule_is_refused(toy, tmp_path, capsys, settings, fault):
    with pytest.raises(SystemExit, match="2"):
        toy.train(tmp_path / "out", {**settings, "ABNORMAL_CHECKER.ENABLED": True})
    (line,) = errors(capsys.readouterr().err)
    assert fault in line


def test_auto_is_the_gain_rule_where_d2scale_takes_the_steps(toy, tmp_path):
    batch = {**METHOD, "D2SCALE.ACCUMULATION_STEPS": 8}
    toy.train(tmp_path / "gain", batch)
    plan = json.loads((tmp_path / "gain" / "plan.json").read_text())
    assert (plan["lr_rule"], plan["ims_per_batch"]) == ("gain", 8)
    # The trainer cannot split its step, so the whole batch is one part.
    batch = {**METHOD, "D2SCALE.IMS_PER_GPU": 8, "ABNORMAL_CHECKER.ENABLED": True}
    with pytest.raises(StopIteration):
        toy.train(tmp_path / "linear", batch, steps=0)
    plan = json.loads((tmp_path / "linear" / "plan.json").read_text())
    assert (plan["lr_rule"], plan["ims_per_batch"]) == ("linear", 8)
    assert any("scaled linearly, which may cost" in note for note in plan["notes"])


def test_other_rules_measure_the_noise_once_a_line(toy, tmp_path):
    toy.train(tmp_path / "out", {"D2SCALE.LR_RULE": "linear", "WRITER_PERIOD": 6})
    lines = toy.metrics(tmp_path / "out")
    assert list(lines) == [5, 11, 17, 23]
    assert all(line["noise_scale"] > 0 and "gain" not in line for line in lines.values())


RECIPE = (
    META_FCOS
    + """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}
SOLVER: {REFERENCE_WORLD_SIZE: 1, IMS_PER_BATCH: 2, MAX_ITER: 8, STEPS: [], WARMUP_ITERS: 2,
         BASE_LR: 0.001, CHECKPOINT_PERIOD: 4, AUTO_SCALING_METHODS: [d2scale_max_memory]}
D2SCALE: {LR_RULE: gain, IMS_PER_GPU: 2, MAX_IMS_PER_BATCH: 4}
TEST: {FINAL_EVAL: false}
WRITER_PERIOD: 1
SEED: 3
"""
)


def test_another_number_of_processes_keeps_the_recipes_steps(toy, d2go, tmp_path):
    out = tmp_path / "out"
    d2go(RECIPE, processes=2)
    before = load(out / "model_0000003.pth")["d2scale"]
    for name in ("model_0000007.pth", "model_final.pth"):
        (out / name).unlink()
    (out / "last_checkpoint").write_text("model_0000003.pth")
    (out / "metrics.json").unlink()
    output = d2go(RECIPE, "--resume", processes=1)
    assert "Starting training from iteration 4" in output
    record = load(out / "model_final.pth")["d2scale"]
    assert (before["plan"]["ims_per_batch"], record["plan"]["ims_per_batch"]) == (4, 2)
    # At the recipe's own batch a step is worth one.
    clock, tau = before["clock"], before["clock"]["recipe_images"] / 2
    lines = [line for line in toy.metrics(out).values() if line["steps"] > clock["steps"]]
    reached = sorted({line["recipe_steps"] for line in lines})
    assert reached == pytest.approx([tau + step for step in range(1, len(reached) + 1)])
    assert 8 <= reached[-1] < 9
    assert record["images_seen"] == before["images_seen"] + 2 * len(reached)
