from d2scale.commands.doctor import diagnose


def test_the_report_names_what_matters():
    lines = dict(line.split(":", 1) for line in diagnose().splitlines())
    assert {"d2scale", "Python", "torch", "detectron2", "devices", "datasets"} <= set(lines)
    assert "CUDA" in lines["devices"] or "GiB" in lines["devices"]
