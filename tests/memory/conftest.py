import pytest


@pytest.fixture(scope="module", autouse=True)
def _ranks_are_forks(warm_ranks):
    """How ranks are started is tested in tests/launch."""
