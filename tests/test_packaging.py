"""What leaves this repository: the wheel, the citation, and the model card of a policy."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT, metrics

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_wheel_holds_mixdpo_and_nothing_else(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    source.mkdir()
    # A copy: setuptools leaves build/ and *.egg-info beside what it builds.
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for folder in ("verify", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"mixdpo-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        (metadata,) = (z.read(name).decode() for name in names if name.endswith("/METADATA"))
        assert z.read("mixdpo.py") == (ROOT / "mixdpo.py").read_bytes()
    assert [name for name in names if ".dist-info/" not in name] == ["mixdpo.py"]
    assert any(name.endswith("/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as z:
        z.extractall(target)
    code = "import mixdpo, sys; print(mixdpo.Gamma().mean.item(), mixdpo.__file__)"
    alone = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {code}"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert alone.stdout.startswith("0.1197")
    assert str(target) in alone.stdout


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["url"].endswith("2601.06180")
    assert all(set(author) == {"family-names", "given-names"} for author in paper["authors"])


def test_a_policy_has_a_model_card_and_generates(one_process):
    policy = one_process / "policy"
    card = ModelCard.load(policy / "README.md")
    assert card.data.library_name == "transformers"
    strength = json.loads((one_process / "strength.json").read_text())
    last = [line for line in metrics(one_process) if "eval/loss" in line][-1]
    for name, value in [("concentration", strength["concentration"]), ("cv", strength["cv"])]:
        assert f"| {name} | {value} |" in card.content
    assert f"| logps/chosen | {last['eval/logps/chosen']} |" in card.content
    assert "| beta_lr | 0.0003 |" in card.content
    assert "| used | 101 |" in card.content
    assert not re.search(r"[ '\"|]/\w", card.content.replace("logps/", "").replace("rewards/", ""))  # no path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    ids = tokenizer("What is it like?", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape[1] == ids["input_ids"].shape[1] + 4
