"""The grid of the paper's experiments: planned, run, gone on with, and reported; and what its statements rest on."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import pytest

import evaluate
from tests.conftest import ROOT, in_process
from tests.judge_server import serve
from verify import report, reproduce
from verify.report import CANNOT, DOES_NOT, HOLDS, Measured


class Counting:
    """Runs in this process; fails, or stops, where a command holds a word."""

    def __init__(self, fail: str = "no command holds this"):
        self.fail, self.commands = fail, []

    def __call__(self, command: list[str], log: Path) -> int:
        self.commands.append(command)
        if self.fail in " ".join(command):
            # A fault of the run's own making: a flag that train.py refuses.
            command = [*command, "--lr", "nan"]
        return in_process(command, log)


@pytest.fixture(scope="module")
def grid(small_grid, tmp_path_factory):
    """A grid in which one run failed; then the same with one seed more."""
    output = tmp_path_factory.mktemp("grid") / "runs"
    said, launches = [], [Counting("demo-0--tiny--seed0/gamma-1e-4"), Counting()]
    statuses = []
    for seeds, launch in enumerate(launches, 1):
        text, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(errors):
            arguments = ["--scale", "tiny", "--seeds", str(seeds), "--output-dir", str(output)]
            statuses.append(reproduce.main(arguments, launch))
        said.append((text.getvalue(), errors.getvalue()))
    return output, statuses, said, launches


def test_a_failed_run_stops_no_other_and_is_run_again(grid):
    output, statuses, said, (first, second) = grid
    assert statuses == [1, 0], said
    assert "failed with status 2" in said[0][0]
    assert "--lr must be finite" in said[0][0]
    assert said[0][1] == "reproduce: failed, and run again by the same command: demo-0--tiny--seed0/gamma-1e-4\n"
    # two trials; two data sets with three runs and margins each
    assert len(first.commands) == 2 + 2 * 4
    # then the failed run, and the margins of its cell, which it changes; and the second seed
    assert [c[:2] for c in second.commands[:2]] == [["train.py", "--dist"], ["evaluate.py", "margins"]]
    assert len(second.commands) == 2 + 2 * 4
    assert all("seed1" in " ".join(c) for c in second.commands[2:])
    assert "demo-0--tiny--seed0/gamma-1e-4" in " ".join(second.commands[0])
    assert not list(output.rglob("checkpoints"))


def test_the_plan_comes_first_and_says_how_much(grid):
    output, _, said, _ = grid
    plan, _, _ = said[0][0].partition("[  1/")
    assert "6 runs (3 configurations, 1 seeds) and 2 SFT runs; about" in plan
    assert "12 runs (3 configurations, 2 seeds) and 4 SFT runs; about" in said[1][0]
    assert re.search(r"demo-1.5--tiny +64 +2 ", plan)
    saved = json.loads((output / "plan.json").read_text())
    trial = saved["trials"]["demo-0--tiny"]
    size = sum(p.stat().st_size for p in (output / "demo-0--tiny--seed0/dpo/policy").iterdir())
    assert trial["policy_bytes"] == pytest.approx(size, rel=1e-3)  # numbers in the model card differ in length
    assert trial["updates"] == 2


def test_the_runs_of_a_cell_share_sft_and_reference(grid):
    output, _, _, (_, second) = grid
    sft = [c for c in second.commands if c[0] == "train.py" and "demo-1.5--tiny--seed1" in " ".join(c)]
    assert len({c[c.index("--sft-dir") + 1] for c in sft}) == 1
    log = (output / "logs" / "demo-1.5--tiny--seed1--gamma-1e-4.log").read_text()
    assert "SFT: taken from" in log
    assert "reference: log-probs taken from" in log
    config = json.loads((output / "demo-1.5--tiny--seed1/gamma-1e-4/config.json").read_text())
    assert (config["demo_heterogeneity"], config["seed"], config["beta_lr"], config["dist"]) == (1.5, 1, 1e-4, "gamma")


def test_every_number_of_the_report_is_that_of_the_runs(grid):
    output, _, _, _ = grid
    data = json.loads((output / "report" / "report.json").read_text())
    assert len(data["cells"]) == 4
    assert data["failures"] == {}
    cell = output / "demo-0--tiny--seed1"
    mine = data["cells"]["demo-0--tiny--seed1"]
    assert mine["runs"]["gamma-1e-4"]["strength"] == json.loads((cell / "gamma-1e-4/strength.json").read_text())
    saved = json.loads((cell / "margins/margins.json").read_text())
    assert mine["margins"]["gains"]["dpo"]["gamma-1e-4"] == saved["summary"]["gamma-1e-4"]["sum"]["gain"]
    by_hand = [a - b for a, b in zip(*(saved["values"][n]["sum"] for n in ("gamma-1e-4", "dpo-matched")), strict=True)]
    assert mine["margins"]["gains"]["dpo-matched"]["gamma-1e-4"]["mean"] == pytest.approx(sum(by_hand) / len(by_hand))
    text = (output / "report" / "report.md").read_text()
    both = [
        data["cells"][f"demo-0--tiny--seed{k}"]["margins"]["summary"]["dpo"]["sum"]["margin"]["mean"] for k in (0, 1)
    ]
    assert f"{sum(both) / 2:.3f} [" in text
    assert "values" not in mine["margins"]  # of single pairs
    # What is shown to others names no directory of this machine.
    for path in (output / "report").glob("report.*"):
        assert str(output) not in path.read_text(), path


def test_the_report_has_its_figures_and_the_page_stands_alone(grid):
    output = grid[0] / "report"
    text, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    figures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert {f.split("--")[0].removesuffix(".png") for f in figures} == {
        "fig2", "fig3", "fig4", "fig5", "densities-gamma", "confound", "planted",
    }  # fmt: skip
    for figure in figures:
        assert (output / figure).stat().st_size > 1000
        assert (output / figure).with_suffix(".svg").exists()
    assert len(re.findall("<img", page)) == len(figures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in ("DPO, beta 0.12", "Gamma", "cannot be told here", "No judge was given"):
        assert name in text, name
        assert name in page, name


def test_a_grid_of_another_version_is_left_alone(grid, monkeypatch, capsys):
    output = grid[0]
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    monkeypatch.setattr(reproduce, "versions", lambda: {"torch": "0"})
    assert reproduce.main(["--scale", "tiny", "--seeds", "2", "--output-dir", str(output)], in_process) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds another grid (versions" in error
    assert "nothing was changed" in error
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*")}


def test_win_rates_of_a_finished_grid(grid, tmp_path, capsys, monkeypatch):
    """A judge given later judges what is there; DPO at the matched mean is a row of its own."""
    output = tmp_path / "runs"
    shutil.copytree(grid[0], output)
    # One cell of the four: generation takes its time.
    plan = json.loads((output / "plan.json").read_text())
    (output / "plan.json").write_text(json.dumps(plan | {"datasets": ["demo-0"], "seeds": [0]}))
    monkeypatch.setattr(reproduce, "HELD_OUT", 16)
    # Saved paths are of the first place: margins are made again, training is not.
    launch = Counting()
    with serve({}) as server:
        arguments = ["--scale", "tiny", "--dataset", "demo-0", "--output-dir", str(output)]
        status = reproduce.main([*arguments, "--judge-url", server.url, "--judge-model", "rule"], launch)
    said = capsys.readouterr()
    assert status == 0, said
    assert "judge: rule answers (log-probs)" in said.out
    assert "train.py" not in [c[0] for c in launch.commands]
    data = json.loads((output / "report" / "report.json").read_text())
    rates = data["cells"]["demo-0--tiny--seed0"]["win_rates"]
    assert set(rates["rates"]) == set(reproduce.CONFIGURATIONS)
    assert "Table 1." in (output / "report" / "report.md").read_text()
    saved = json.loads((output / "demo-0--tiny--seed0/judgements/winrate.json").read_text())
    assert sorted(c["row"][0] for c in saved["cells"]) == ["DPO", "DPO, beta 0.12", "Gamma"]
    assert {c["reference"] for c in saved["comparisons"]} == {"dpo"}


def test_all_local_devices_are_used(monkeypatch):
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 4"
    for devices, command, expected in (
        (0, ["train.py"], "train.py"),
        (1, ["train.py"], "train.py"),
        (4, ["train.py"], f"{launcher} train.py"),
        (4, ["evaluate.py", "margins"], f"{launcher} evaluate.py margins"),
        (4, ["evaluate.py", "judge"], "evaluate.py judge"),
    ):
        monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda devices=devices: devices)
        assert " ".join(reproduce.command_line(command)[1:]) == expected


def test_a_readme_without_marks_is_left_alone(grid, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert report.main([str(grid[0]), "--output-dir", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 2
    assert "put both where the table should stand" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_group_of_one_annotator_is_not_shown():
    groups = {"old": {"clusters": 2}, "young": {"clusters": 1}}
    kept = report.of_several({"age": {"groups": groups, "macro": 1.0}, "region": {"groups": {"west": {"clusters": 1}}}})
    assert kept == {"age": {"groups": {"old": {"clusters": 2}}, "macro": 1.0}}


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_the_saved_reports_have_their_figures(scale):
    saved = ROOT / "verify" / "results" / f"reproduce-{scale}"
    for figure in re.findall(r"!\[.*\]\((.*)\)", (saved / "report.md").read_text(encoding="utf-8")):
        assert (saved / figure).exists(), figure


BAD = {
    "unknown data set": (["--dataset", "nonsense"], "--dataset nonsense is unknown: one of hh, prism,"),
    "unknown model": (["--model", "no/such-model"], "--model no/such-model cannot be reached"),
    "no seeds": (["--seeds", "0"], "--seeds must be at least 1"),
    "two of one name": (["--model", "a/x", "b/x"], "two of one name"),
    "judge without a model": (["--judge-url", "http://127.0.0.1:9/v1"], "needs --judge-model"),
    "no such scale": (["--scale", "huge"], "--scale"),
    "data not there": (["--dataset", "hh", "--data-dir", "/nonexistent"], "/nonexistent/hh-rlhf holds no"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_before_any_run(name, small_grid, tmp_path, capsys):
    arguments, message = BAD[name]
    launch = Counting()
    assert reproduce.main(["--output-dir", str(tmp_path / "out"), *arguments], launch) == 2
    error = capsys.readouterr().err
    assert error.startswith("reproduce: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert len(launch.commands) <= 1  # the trial


def test_a_judge_that_does_not_answer_is_found_before_training(small_grid, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "FIRST_WAIT", 0.0)
    launch = Counting()
    arguments = ["--output-dir", str(tmp_path / "out"), "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m"]
    assert reproduce.main(arguments, launch) == 2
    error = capsys.readouterr().err
    assert error.startswith("reproduce: error: http://127.0.0.1:9/v1 cannot be reached (")
    assert error.count("\n") == 1
    assert launch.commands == []
    assert not (tmp_path / "out").exists()


def test_no_room_for_the_plan(small_grid, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    launch = Counting()
    arguments = ["--output-dir", str(tmp_path / "out"), "--dataset", "demo-0"]
    assert reproduce.main(arguments, launch) == 2
    assert "has 0.00 GB free, the plan needs" in capsys.readouterr().err
    assert len(launch.commands) == 1


def test_an_interrupt_saves_and_the_same_command_goes_on(small_grid, tmp_path, capsys):
    """A real signal to the grid while a real process trains: first in the trial, then in a run."""
    output = tmp_path / "out"
    arguments = ["--output-dir", str(output), "--dataset", "demo-0"]

    def interrupted(wait_for: str) -> Thread:
        def watch() -> None:
            while not list(output.glob(wait_for)):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        return Thread(target=watch)

    for wait_for in ("trial/gamma/config.json", "demo-0--tiny--seed0/dpo/metrics.jsonl"):
        thread = interrupted(wait_for)
        thread.start()
        assert reproduce.main(arguments) == 75
        thread.join()
        assert capsys.readouterr().err == "reproduce: interrupted and saved: the same command goes on\n"
    log = (output / "logs" / "demo-0--tiny--seed0--dpo.log").read_text()
    assert "the same command goes on" in log.splitlines()[-1]
    launch = Counting()
    assert reproduce.main(arguments, launch) == 0, capsys.readouterr()
    assert [c[0] for c in launch.commands] == ["train.py"] * 3 + ["evaluate.py"]  # no second trial


def test_a_directory_of_something_else_is_refused(small_grid, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert reproduce.main(["--output-dir", str(tmp_path)], Counting()) == 2
    assert "is not empty and holds no plan.json" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 2
    assert "holds no plan.json" in capsys.readouterr().err


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 0.9, 0.4, 1.1]
    expected = stats.t.interval(0.95, 3, loc=0.675, scale=stats.sem(values))
    assert Measured(values).interval() == pytest.approx(expected)
    assert Measured([1.0], 0.5).interval() == pytest.approx(stats.norm.interval(0.95, 1, 0.5))
    assert Measured([1.0]).interval() is None


UP, DOWN, WIDE, ALONE = (
    Measured([1.0, 1.1, 0.9]),
    Measured([-1.0, -1.1, -0.9]),
    Measured([-1.0, 0.1, 1.2]),
    Measured([1.0]),
)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([UP, UP], HOLDS),
        ([UP, WIDE], CANNOT),
        ([UP, ALONE], CANNOT),  # no interval
        ([UP, DOWN], DOES_NOT),
        ([WIDE, DOWN], DOES_NOT),
        ([], CANNOT),
        ([None], CANNOT),
    ],
)
def test_verdict_of_all_positive(values, verdict):
    found = report.all_positive("source", "text", [(f"claim {i}", v) for i, v in enumerate(values)], "missing")
    assert found.verdict == verdict
    assert len(found.evidence) == len([v for v in values if v])


def test_one_of_many_slightly_negative_groups_is_not_enough():
    """At 95 % it would be told; as the worst of twenty it may be chance."""
    slightly = Measured([-0.5], 0.2)
    assert report.all_positive("s", "t", [("one", slightly)], "").verdict == DOES_NOT
    many = [("worst", slightly), *((f"group {i}", Measured([0.3], 0.2)) for i in range(19))]
    assert report.all_positive("s", "t", many, "").verdict == CANNOT


def test_no_loss_at_all_is_no_lowering():
    same = [("equal", Measured([0.0, 0.0]))]
    assert report.all_positive("s", "t", same, "", strict=False).verdict == HOLDS
    assert report.all_positive("s", "t", same, "").verdict == CANNOT


def test_verdict_of_same_order():
    def verdict(*claims):
        return report.same_order("s", "t", {"a - b": [(f"m{i}", v) for i, v in enumerate(claims)]}, "missing").verdict

    assert verdict(UP, UP) == HOLDS
    assert verdict(DOWN, DOWN) == HOLDS
    assert verdict(UP, DOWN) == DOES_NOT
    assert verdict(UP, WIDE) == CANNOT
    assert verdict(UP) == CANNOT  # one setting has no order to share


def test_verdict_of_equals():
    def verdict(*values):
        return report.equals("s", "t", [("time", Measured(list(values)), 1.02)], 0.03).verdict

    assert verdict(1.02, 1.021, 1.019) == HOLDS
    assert verdict(1.5, 1.51, 1.49) == DOES_NOT
    assert verdict(0.9, 1.3, 1.0) == CANNOT
    assert verdict(1.02) == CANNOT  # no interval
