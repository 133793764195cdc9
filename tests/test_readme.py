"""The README is true: its snippet runs, its commands exist, its tables name what there is."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM

import evaluate
import train
from tests.conftest import ROOT, in_process, metrics, run_command
from tests.judge_server import serve
from tests.test_data import PERSON, utterance, write_prism
from tests.test_train import write_hh
from verify import __main__ as checks
from verify import bench, report, reproduce
from verify.small_model import configuration

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOXFILE = (ROOT / "noxfile.py").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line]


def test_the_snippet_runs_with_mixdpo_alone(tmp_path):
    snippet, *for_trainers = blocks("python")  # the others are run by nox -s interop
    (tmp_path / "mixdpo.py").write_text((ROOT / "mixdpo.py").read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "0.1198" in done.stdout
    assert len(for_trainers) == 2
    for code in for_trainers:
        ast.parse(code)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command, capsys):
    sessions = {f.name for f in ast.parse(NOXFILE).body if isinstance(f, ast.FunctionDef)}
    for part in command.split(" && "):
        words = shlex.split(part)
        if words[0] == "nox":
            assert words[2] in sessions
        elif "train.py" in words:
            train.parse_config(words[words.index("train.py") + 1 :])
        elif "evaluate.py" in words:
            with pytest.raises(SystemExit):
                evaluate.main([words[words.index("evaluate.py") + 1], "--help"])
            known = capsys.readouterr().out
            assert all(word in known for word in words if word.startswith("--"))
        else:
            assert words[:2] == ["pip", "install"], part


# What makes a command short: later flags win. What needs an hour or a GPU keeps its own flags but for the model's size.
SHORT = ["--preset", "tiny", "--max-pairs", "96", "--eval-pairs", "32", "--sft-epochs", "1"]
SHORTER = {"margins": ["--pairs", "40"], "generate": ["--prompts", "6", "--max-new-tokens", "8"]}


def test_every_command_of_the_trainer_runs(tmp_path, monkeypatch, capsys):
    """In the README's order, each on what the ones before it have left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    ran = 0
    with serve() as server:
        for command in COMMANDS:
            words = shlex.split(command.replace("http://127.0.0.1:8000/v1", server.url))
            if words[0] == "python" and words[1] == "train.py":
                assert train.main([*words[2:], *SHORT]) == 0, command
            elif words[0] == "python" and words[1] == "evaluate.py":
                assert evaluate.main([*words[2:], *SHORTER.get(words[2], [])]) == 0, command
            else:
                continue
            ran += 1
    assert ran == 11
    assert "LC-WR" in capsys.readouterr().out


def test_torchrun_as_the_readme_has_it(tmp_path):
    (command,) = (c for c in COMMANDS if c.startswith("torchrun"))
    words = shlex.split(command)
    data = ["--dataset", "demo", "--model", "tiny", "--output-dir", str(tmp_path / "run")]
    done = run_command(*words[words.index("train.py") :], *SHORT, *data, processes=2)
    assert done.returncode == 0, done.stderr
    assert "Gamma(concentration=" in done.stdout


GRIDS = [c for c in COMMANDS if c.startswith("nox -s reproduce")]


@pytest.mark.parametrize("command", GRIDS)
def test_the_grids_of_the_readme_run(command, small_grid, tmp_path, monkeypatch, capsys):
    """As they stand but for one seed and short runs; a small model answers to the large one's name, and rows in the
    layouts of the data sets to theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXDPO_DATA", str(tmp_path))
    tokenizer = train.byte_tokenizer()
    network = AutoModelForCausalLM.from_config(configuration("gpt_neox", 64, 2, len(tokenizer)))
    for part in (network, tokenizer):
        part.save_pretrained("EleutherAI/pythia-2.8b")
    talk = "\n\nHuman: question {0}\n\nAssistant: {1} {0}"
    write_hh(tmp_path / "hh-rlhf", [(talk.format(i, "yes"), talk.format(i, "no")) for i in range(200)], "train")
    write_hh(tmp_path / "hh-rlhf", [(talk.format(i, "yes"), talk.format(i, "no")) for i in range(200, 260)])
    people = {f"user{i}": PERSON for i in range(30)}
    turns = [
        utterance(f"c{i}-{k}", 0, f"answer {k} {chosen}", chosen, f"user{i}")
        for i in range(30)
        for k in range(12)
        for chosen in (True, False)
    ]
    write_prism(tmp_path / "prism-alignment", turns, people)
    words = shlex.split(command)
    words = words[words.index("--") + 1 :]
    assert reproduce.main([*words, "--seeds", "1"], in_process) == 0, capsys.readouterr()
    (output,) = (tmp_path / "runs").iterdir()
    assert len(list(output.glob("*/*/strength.json"))) == 2 * 3  # data sets, configurations
    assert (output / "report" / "report.html").exists()
    assert reproduce.parse(words).seeds > 1


def test_the_tables_name_what_a_run_leaves(one_process):
    for path in one_process.iterdir():
        assert f"`{path.name}" in README, path.name
    for name in {key.split("/", 1)[1] if "/" in key else key for line in metrics(one_process) for key in line}:
        assert f"{name}`" in README or name in ("step", "examples"), name


SHOWN = {
    "verify.json": (checks, "python -m verify --readme README.md"),
    "bench.json": (bench, "python -m verify.bench --readme README.md"),
    "reproduce-tiny/report.json": (report, "python -m verify.report RUNS --output-dir DIR --readme README.md"),
}


@pytest.mark.parametrize("results", SHOWN)
def test_the_tables_are_those_of_the_saved_results(results):
    module, command = SHOWN[results]
    saved = json.loads((checks.RESULTS / results).read_text(encoding="utf-8"))
    assert README.split(module.BEGIN)[1].split(module.END)[0].strip() == module.short(saved), command


def test_versions_tried_are_within_the_ranges_for_users():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = dict(pin.split("==") for pin in project["dependency-groups"]["dev"])
    for requirement in map(Requirement, project["project"]["dependencies"]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert Path(project["tool"]["setuptools"]["py-modules"][0] + ".py").name == "mixdpo.py"
