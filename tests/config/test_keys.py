from d2scale.config import get_cfg
from d2scale.config.keys import get_key, set_key


def test_a_key_is_read_and_set_by_its_dotted_name():
    cfg = get_cfg()
    set_key(cfg, "SOLVER.AMP.ENABLED", True)
    assert get_key(cfg, "SOLVER.AMP.ENABLED") is True
    assert cfg.SOLVER.AMP.ENABLED is True


def test_a_key_that_an_engine_lacks_has_the_default():
    cfg = get_cfg()
    assert get_key(cfg, "SOLVER.AMP.NO_SUCH_KEY") is None
    assert get_key(cfg, "SOLVER.BASE_LR.DEEPER", 3) == 3
