from __future__ import annotations

import pytest

from d2scale.errors import ConfigError
from d2scale.launch.launch import Topology, launch
from d2scale.step import ranks
from rank_functions import (
    compressed_gradients,
    exchanges,
    exchanges_alone,
    given_other_settings,
)


def test_values_of_two_ranks():
    found = launch(exchanges, topology=Topology(2))
    assert found == {
        "largest": {"a": 1.0, "b": 2.0},
        "gathered": [0, 1],
        "broadcast": 0,
        "same": (True, False),
        "weights": [[0.0], [0.0]],
    }


def test_one_rank_needs_no_group():
    assert ranks.gather_objects(3) == [3]
    assert ranks.broadcast_object(3) == 3
    assert ranks.largest_over_ranks({"a": 1.0}) == {"a": 1.0}
    ranks.refuse_differences({"a": 1}, "start it alike")


def test_a_rank_that_is_alone_exchanges_nothing():
    own, everybody = launch(exchanges_alone, topology=Topology(2))
    assert own == (0, 1, [0])
    assert everybody == [0, 1]


def test_other_settings_are_named_on_every_rank():
    with pytest.raises(ConfigError) as error:
        launch(given_other_settings, topology=Topology(3))
    assert [str(fault) for fault in error.value.faults] == [
        "SOLVER.BASE_LR on rank 1 is 0.2; allowed: 0.1, as on rank 0; start all alike",
        "SOLVER.MAX_ITER on rank 2 is None; allowed: 5, as on rank 0; start all alike",
    ]


def test_compressed_gradients_cross_the_network_in_half_precision():
    exact, half = launch(compressed_gradients, topology=Topology(2))
    # 1/3 has more digits than half precision.
    assert exact == pytest.approx(1 / 3, abs=1e-7)
    assert half != exact
    assert half == pytest.approx(1 / 3, abs=1e-3)
