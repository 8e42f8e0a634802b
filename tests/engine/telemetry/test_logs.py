import logging

from d2scale.engine.telemetry.logs import logging_to


def test_a_name_that_a_terminal_would_obey_is_logged_as_python_writes_it(tmp_path, capsys):
    with logging_to(tmp_path, 0):
        logging.getLogger("d2scale").info("class %s\nnext", "\x1b[31m\udcff")
    logged = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert logged.endswith("class \\x1b[31m\\udcff\nnext\n")
    assert logged in capsys.readouterr().out
