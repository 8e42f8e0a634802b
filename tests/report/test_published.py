import json
import math
from importlib.metadata import EntryPoint
from importlib.resources import files

import pytest

from d2scale.coco.accumulate import METRICS
from d2scale.errors import DataError
from d2scale.report import published
from d2scale.report.published import parse_publication, read_published


def test_the_shipped_runs_are_whole_and_have_their_source():
    (publication,) = (each for each in read_published() if "MetaFCOS" in each.title)
    assert publication.source
    assert (publication.test_set, publication.test_images) == ("coco_pretrain_val_base", 5000)
    names = [run.name for run in publication.runs]
    assert names == ["published 1 baseline", "published 2 same batch", "published 3 large batch"]
    for run in publication.runs:
        assert tuple(run.results) == METRICS
        assert len(run.class_results) == 60
        # The overall value is the mean over classes: no digit was lost on the way.
        mean = math.fsum(run.class_results.values()) / 60
        assert run.results["AP"] == pytest.approx(mean, abs=1e-3)
        assert run.total_seconds > run.seconds_per_step * run.settings["SOLVER.MAX_ITER"]
    first, second, third = publication.runs
    # As the log says; the article's own table has 32.622.
    assert third.results["AP"] == 32.662
    assert [run.images_seen for run in publication.runs] == [480_000, 480_000, 450_000]
    assert second.total_seconds > first.total_seconds > third.total_seconds
    assert (second.world_size, third.ims_per_batch) == (1, 30)


def test_classes_are_those_of_the_test_set():
    from d2scale.coco.catalog import dataset_spec

    for publication in read_published():
        names = set(dataset_spec(publication.test_set).class_names)
        assert all(set(run.class_results) == names for run in publication.runs)


@pytest.fixture
def shipped():
    folder = files("meta_fcos.published")
    return json.loads((folder / "two-rtx-5000.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", ["title", "source", "test_set", "test_images", "settings", "runs"])
def test_a_file_that_lacks_something_is_refused(shipped, key, tmp_path, monkeypatch):
    del shipped[key]
    with pytest.raises(KeyError):
        parse_publication(shipped)
    (tmp_path / "broken.json").write_text(json.dumps(shipped))
    monkeypatch.setattr(published, "files", lambda module: tmp_path)
    with pytest.raises(DataError, match=r"broken\.json"):
        read_published()


@pytest.mark.parametrize("text", ["", "[]", "{half"])
def test_a_file_of_another_form_is_refused(text, tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text(text)
    monkeypatch.setattr(published, "files", lambda module: tmp_path)
    with pytest.raises(DataError, match=r"broken\.json"):
        read_published()


def test_no_publication_a_package_that_is_gone_and_one_without_files(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "entry_points", lambda group: [])
    with pytest.raises(DataError, match="none installed"):
        read_published()
    gone = EntryPoint("gone", "no_such_package_anywhere", published.ENTRY_POINTS)
    monkeypatch.setattr(published, "entry_points", lambda group: [gone])
    with pytest.raises(DataError, match="no_such_package_anywhere"):
        read_published()
    monkeypatch.setattr(published, "files", lambda module: tmp_path)
    with pytest.raises(DataError, match="JSON files"):
        read_published()
