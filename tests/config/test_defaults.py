from d2scale.config import get_cfg
from d2scale.config.defaults import add_project_configs
from d2scale.config.loading import flatten
from d2scale.planning.coverage import coverage


class EntryPoint:
    def __init__(self, function):
        self._function = function

    def load(self):
        return self._function


def add_depth(cfg):
    cfg.MODEL.TOY = type(cfg)({"DEPTH": 3, "CENTER_RADIUS": 1.5, "LOSS": type(cfg)({"SUM": True})})
    return ("MODEL.TOY.CENTER_RADIUS", "MODEL.TOY.LOSS")


def add_height(cfg):
    cfg.MODEL.OTHER = type(cfg)({"HEIGHT": 3})


def test_projects_add_keys_and_say_which_have_no_influence_on_memory(monkeypatch):
    entries = [EntryPoint(add_depth), EntryPoint(add_height)]
    monkeypatch.setattr("d2scale.config.defaults.entry_points", lambda group: entries)
    cfg = get_cfg()
    assert add_project_configs(cfg) == ("MODEL.TOY.CENTER_RADIUS", "MODEL.TOY.LOSS")
    assert dict(flatten(cfg))["MODEL.TOY.LOSS.SUM"] is True
    covered = [key for key in coverage(cfg) if key.startswith(("MODEL.TOY", "MODEL.OTHER"))]
    assert covered == ["MODEL.OTHER.HEIGHT", "MODEL.TOY.DEPTH"]
