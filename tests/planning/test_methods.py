import pytest

from d2scale.errors import ConfigError
from d2scale.planning.methods import method_of


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ([], "keep_total"),
        (["d2scale_max_memory"], "max_memory"),
        (["default_scale_d2_configs", "default_scale_quantization_configs"], "per_gpu"),
    ],
)
def test_the_config_names_the_method(methods, expected):
    assert method_of(methods) == expected


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["d2scale_per_gpu", "d2scale_keep_total"], "twice"),
        (["d2scale_per_gpu", "d2scale_per_gpu"], "twice"),
        (["default_scale_d2_configs", "d2scale_per_gpu"], "twice"),
        (["d2scale_fill"], "d2scale_max_memory"),
        (["their_method"], "default_scale_d2_configs"),
    ],
)
def test_methods_that_are_unknown_or_would_scale_twice_are_refused(methods, message):
    with pytest.raises(ConfigError, match=message):
        method_of(methods)
