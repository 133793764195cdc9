"""verify/ judges what it says it judges."""

import json

import verify.__main__ as command
from verify import table


def test_an_unknown_check_lists_the_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(command.sys, "argv", ["verify", "closed_form", "nonsense"])
    assert command.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("verify: error: no check named nonsense: choose from closed_form, series_bound,")
    assert error.count("\n") == 1


def test_verdicts():
    assert table.at_most("c", "s", "e", 1.0, 1.0).verdict == "passed"
    assert table.at_most("c", "s", "e", float("nan"), 1.0).verdict == "failed"
    assert not table.oracle_failed("c", "s", 1.0, 0.5).ok
    assert table.reported("c", "s", "e", 1.0).ok


def test_a_check_that_breaks_is_a_failed_row(monkeypatch, capsys):
    monkeypatch.setattr("verify.series_bound.check", lambda full: 1 / 0)
    (row,) = command.run("series_bound", False)["rows"]
    assert row["verdict"] == "failed"
    assert "ZeroDivisionError" in row["measured"]


def test_the_saved_results_are_of_this_mixdpo_and_pass():
    saved = json.loads((command.RESULTS / "verify.json").read_text(encoding="utf-8"))
    assert set(saved) == set(command.CHECKS)
    for name, entry in saved.items():
        assert entry["mixdpo"] == command.fingerprint(), f"{name} judged another mixdpo.py: run nox -s verify"
        assert all(row.ok for row in command.rows_of(entry)), name


def test_the_saved_table_is_of_the_saved_results():
    saved = json.loads((command.RESULTS / "verify.json").read_text(encoding="utf-8"))
    assert (command.RESULTS / "verify.md").read_text(encoding="utf-8") == command.markdown(saved)
