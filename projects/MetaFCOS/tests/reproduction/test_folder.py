import os

import pytest

from meta_fcos.reproduction.folder import RECORD, claim, folder_faults

SETTINGS = {"--form": "small", "--images-seen": None, "DETECTRON2_DATASETS": "drawn shapes"}


def test_a_claimed_folder_accepts_its_own_settings_again(tmp_path):
    folder = tmp_path / "new" / "one"
    assert folder_faults(folder, SETTINGS, begun=False) == []
    claim(folder, SETTINGS)
    assert folder_faults(folder, SETTINGS, begun=True) == []


def test_other_settings_are_refused_by_name_once_an_experiment_has_begun(tmp_path):
    claim(tmp_path, SETTINGS)
    other = {**SETTINGS, "--images-seen": 800}
    (fault,) = folder_faults(tmp_path, other, begun=True)
    assert (fault.key, fault.value) == ("--images-seen", 800)
    assert "None" in fault.allowed
    assert folder_faults(tmp_path, other, begun=False) == []


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 2, "settings": {}}'])
def test_a_record_of_somebody_else_is_none(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    assert "other files" in folder_faults(tmp_path, SETTINGS, begun=True)[0].advice


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "is a file" in folder_faults(path, SETTINGS, begun=False)[0].advice


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_must_be_writable(tmp_path):
    tmp_path.chmod(0o500)
    assert folder_faults(tmp_path / "new", SETTINGS, begun=False)
