"""A user's mistake is one line on stderr with the thing, its value and the remedy; status 2; no model is loaded."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate
import train

PAIRS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(400)]


@pytest.fixture(autouse=True)
def no_model_and_no_hub(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train, "load_model", fail)
    monkeypatch.setattr(evaluate, "load_policy", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def jsonl(path: Path, rows: list) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def broken(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def model_without_eos(path: Path) -> str:
    LlamaConfig(vocab_size=258, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(path)
    tokenizer = train.byte_tokenizer()
    train.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(path)
    return str(path)


def finished_run(path: Path, **changes: object) -> str:
    config = train.parse_config(["--preset", "tiny", "--output-dir", str(path)])
    train.write_json(path / "config.json", train.dataclasses.asdict(config) | changes)
    train.write_json(path / "strength.json", {})
    return str(path)


def foreign(path: Path) -> str:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    return str(path)


def own_sft(path: Path, record: dict | None) -> str:
    path.mkdir()
    (path / "notes.txt").write_text("")
    if record is not None:
        train.write_json(path / "sft.json", record)
    return str(path)


TRAIN = {
    "choice": (lambda d: ["--dist", "beta"], ["--dist", "'beta'", "gamma"]),
    "number": (lambda d: ["--beta-lr", "fast"], ["--beta-lr", "'fast'"]),
    "unknown flag": (lambda d: ["--betalr", "1"], ["--betalr"]),
    "abbreviated flag": (lambda d: ["--beta-l", "1"], ["--beta-l"]),
    "negative": (lambda d: ["--lr", "-1"], ["--lr", "-1.0", "> 0"]),
    "nan": (lambda d: ["--rate", "nan"], ["--rate", "nan"]),
    "loc": (lambda d: ["--loc", "inf"], ["--loc", "inf"]),
    "lengths": (lambda d: ["--max-length", "64"], ["--max-prompt-length 64", "--max-length 64"]),
    "micro-batch": (lambda d: ["--micro-batch-tokens", "100"], ["--micro-batch-tokens 100", "256"]),
    "unknown data set": (lambda d: ["--dataset", "hhh"], ["--dataset 'hhh'", "demo"]),
    "no such file": (lambda d: ["--dataset", f"{d}/none.jsonl"], ["none.jsonl", "does not exist"]),
    "missing column": (
        lambda d: ["--dataset", jsonl(d / "a.jsonl", [{"prompt": "p", "chosen": "c"}])],
        ["a.jsonl", "column rejected", "prompt, chosen"],
    ),
    "no rows": (lambda d: ["--dataset", jsonl(d / "a.jsonl", [])], ["a.jsonl", "no rows"]),
    "not JSON": (lambda d: ["--dataset", jsonl(d / "a.jsonl", [*PAIRS, "{no"])], ["a.jsonl, line 401", "not JSON"]),
    "not an object": (lambda d: ["--dataset", jsonl(d / "a.jsonl", [*PAIRS, "3"])], ["line 401", "int"]),
    "not text": (lambda d: ["--dataset", broken(d / "a.jsonl", b"\xff\xfe{}\n")], ["a.jsonl", "cannot be read"]),
    "broken parquet": (lambda d: ["--dataset", broken(d / "a.parquet", b"PAR1")], ["a.parquet", "Parquet"]),
    "empty split": (lambda d: ["--dataset", jsonl(d / "a.jsonl", PAIRS[:1])], ["split", "empty", "a.jsonl"]),
    "fewer pairs than a batch": (
        lambda d: ["--dataset", jsonl(d / "a.jsonl", PAIRS), "--batch-size", "512"],
        ["train pairs", "400 rows", "512", "--batch-size"],
    ),
    "data_dir without the data": (lambda d: ["--dataset", "hh", "--data-dir", str(d)], ["--data-dir", "jsonl.gz"]),
    "data set out of reach": (lambda d: ["--dataset", "hh"], ["Anthropic/hh-rlhf", "--data-dir"]),
    "model out of reach": (lambda d: ["--model", "nobody/nothing"], ["--model nobody/nothing", "local directory"]),
    "model directory empty": (lambda d: ["--model", str(d)], ["--model", "config.json"]),
    "model without EOS": (lambda d: ["--model", model_without_eos(d / "m")], ["no EOS", "eos_token"]),
    "another run's directory": (
        lambda d: ["--output-dir", finished_run(d / "run", lr=3.0)],
        ["--output-dir", "lr 3.0 there, 0.0001 here"],
    ),
    "finished run": (lambda d: ["--output-dir", finished_run(d / "run")], ["finished", "another directory"]),
    "not a run's directory": (lambda d: ["--output-dir", foreign(d / "mine")], ["not empty", "config.json"]),
    "unwritable": (lambda d: ["--output-dir", broken(d / "file", b"")], ["--output-dir", "cannot be written"]),
    "SFT directory of something else": (lambda d: ["--sft-dir", own_sft(d / "s", None)], ["--sft-dir", "checkpoint"]),
    "SFT of another model": (
        lambda d: ["--sft-dir", own_sft(d / "s", {"model": "pythia"})],
        ["--sft-dir", "model 'pythia' there, 'tiny' here"],
    ),
}


def check(code: int, captured: str, name: str, expected: list[str]) -> None:
    assert code == 2
    assert captured.startswith(f"{name}: error: ")
    assert captured.count("\n") == 1, captured
    for text in expected:
        assert text in captured, (text, captured)


@pytest.mark.parametrize("case", TRAIN)
def test_train(case, tmp_path, capsys):
    flags, expected = TRAIN[case]
    given = flags(tmp_path)
    output = [] if "--output-dir" in given else ["--output-dir", str(tmp_path / "out")]
    code = train.main(["--preset", "tiny", *given, *output])
    check(code, capsys.readouterr().err, "train.py", expected)
    assert not (tmp_path / "out").exists()


def test_batch_size_and_ranks(tmp_path):
    config = train.parse_config(["--preset", "tiny", "--output-dir", str(tmp_path)])
    with pytest.raises(train.UserError, match="--batch-size 64 is not a multiple of the 3 ranks"):
        train.run(config, train.World(0, 3, torch.device("cpu")))


def policy(path: Path) -> str:
    finished_run(path)
    small = LlamaConfig(
        vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(path / "policy")
    train.byte_tokenizer().save_pretrained(path / "policy")
    return str(path / "policy")


def without_config(path: Path) -> str:
    given = policy(path)
    (path / "config.json").unlink()
    return given


MARGINS = {
    "not a model": (lambda d: ["--policy", str(d)], ["--policy", "config.json"]),
    "not a run's policy": (lambda d: ["--policy", without_config(d / "r")], ["config.json does not exist"]),
    "too many pairs": (lambda d: ["--policy", policy(d / "r"), "--pairs", "9999"], ["--pairs 9999", "demo", "only"]),
    "too few pairs": (lambda d: ["--policy", policy(d / "r"), "--pairs", "1"], ["--pairs", "2", "1"]),
    "baseline": (lambda d: ["--policy", policy(d / "r"), "--baseline", f"{d}/none"], ["none", "config.json"]),
    "no command": (lambda d: None, ["command"]),
}


@pytest.mark.parametrize("case", MARGINS)
def test_margins(case, tmp_path, capsys):
    flags, expected = MARGINS[case]
    given = flags(tmp_path)
    code = evaluate.main([] if given is None else ["margins", *given])
    check(code, capsys.readouterr().err, "evaluate.py", expected)


def test_reference_cache_of_another_pass(tmp_path, monkeypatch):
    config = train.parse_config(["--preset", "tiny", "--output-dir", str(tmp_path)])
    pairs = train.Pairs([[1]], [[2]], [[3]], [0])
    train.save_file({"train": train.np.zeros((1, 2))}, config.reference_cache, metadata={"weights": "w", "dtype": "x"})
    world = train.World(0, 1, torch.device("cpu"))
    with pytest.raises(train.UserError, match=r"reference.safetensors is of another pass \(.*weights 'w' there, "):
        train.reference_pass(config, {"train": pairs}, world)
    Path(config.reference_cache).write_bytes(b"half a fi")
    with pytest.raises(train.UserError, match="cannot be read"):
        train.reference_pass(config, {"train": pairs}, world)


def test_unknown_split():
    with pytest.raises(train.UserError, match="split 'dev' is unknown: one of train, validation, test"):
        train.load_preferences("demo", "dev")


def test_figures_need_the_extra(monkeypatch):
    monkeypatch.setitem(evaluate.sys.modules, "matplotlib", None)
    with pytest.raises(train.UserError, match=r"mixdpo\[plots\]"):
        evaluate.load_pyplot()
