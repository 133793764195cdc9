"""Models, data and judges that mean harm, or are broken in ways that look like it."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evaluate
import train
from tests.conftest import SMALL
from tests.judge_server import KEY, serve

# --- models


class Payload:
    """Unpickled, it makes the directory PWNED."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def small(tmp_path) -> Path:
    sizes = {"vocab_size": 258, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)).save_pretrained(tmp_path / "m")
    train.byte_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def code_of_its_own(model: Path, file: str, **auto_map: object) -> None:
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(model.parent / 'PWNED')!r})\n")
    change(model / file, auto_map=auto_map)


def pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"x": Payload(model.parent / "PWNED")}, model / "pytorch_model.bin")


def sharded(model: Path, name: str) -> None:
    """Weights that are elsewhere, and an index that leads there."""
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def remote_config(model: Path) -> None:
    code_of_its_own(model, "config.json", AutoConfig="evil.C", AutoModelForCausalLM="evil.M")
    change(model / "config.json", model_type="evil")


def remote_model(model: Path) -> None:
    code_of_its_own(model, "config.json", AutoModelForCausalLM="evil.M")
    change(model / "config.json", model_type="t5")


def remote_tokenizer(model: Path) -> None:
    code_of_its_own(model, "tokenizer_config.json", AutoTokenizer=["evil.T", "evil.T"])
    change(model / "tokenizer_config.json", tokenizer_class="Evil")


def asks_for(**values: object):
    return lambda model: change(model / "config.json", **values)


def writes(name: str, data: bytes):
    return lambda model: (model / name).write_bytes(data)


MODELS = {
    "pickle": (pickled, ["model.safetensors does not exist"]),
    "code with the configuration": (remote_config, ["custom code"]),
    "code with the model": (remote_model, ["custom code"]),
    "code with the tokenizer": (remote_tokenizer, ["custom code"]),
    "shard above": (lambda m: sharded(m, "../outside.safetensors"), ["'../outside.safetensors'", "do not use"]),
    "shard anywhere": (lambda m: sharded(m, str(m.parent / "outside.safetensors")), ["outside.safetensors'", "beside"]),
    "shard that is a pickle": (lambda m: sharded(m, "pytorch_model.bin"), ["'pytorch_model.bin'", "safetensors"]),
    "shard that is not there": (lambda m: sharded(m, "a.safetensors"), ["a.safetensors does not exist"]),
    "width": (asks_for(hidden_size=10**7), ["5,750,000,000 parameters", "4,600"]),
    "width beyond 64 bits": (
        asks_for(hidden_size=10**12, intermediate_size=10**12),
        ["config.json describes no causal model", "size"],
    ),
    "vocabulary": (asks_for(vocab_size=10**12), ["parameters", "4,600"]),
    "depth": (asks_for(num_hidden_layers=10**9), ["num_hidden_layers 1000000000", "weights (12)"]),
    "experts": (asks_for(model_type="mixtral", num_local_experts=10**9), ["num_local_experts 1000000000", "4600"]),
    "no heads": (asks_for(num_attention_heads=0), ["config.json", "zero"]),
    "words for numbers": (asks_for(hidden_size="many"), ["config.json", "'many'"]),
    "quantised": (asks_for(quantization_config={"quant_method": "bitsandbytes"}), ["quantised", "full weights"]),
    "nested": (writes("config.json", b"[" * 10**5), ["config.json", "recursion"]),
    "adapter": (writes("adapter_config.json", b'{"base_model_name_or_path": "evil/base"}'), ["adapter", "merge"]),
    "header of weights": (writes("model.safetensors", (2**60).to_bytes(8, "little")), ["cannot be read", "header"]),
    "tokenizer": (writes("tokenizer.json", b"{"), ["no tokenizer that loads", "save one"]),
    "vocabularies": (asks_for(vocab_size=10), ["10 tokens", "258"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_are_refused_before_anything_is_made(case, small, tmp_path, monkeypatch, capfd):
    harm, expected = MODELS[case]
    harm(small)
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert train.main(["--preset", "tiny", "--model", str(small), "--output-dir", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("train.py: error: ")
    assert error.count("\n") == 1, error
    for text in expected:
        assert text in error, (text, error)
    assert not (tmp_path / "PWNED").exists()
    assert not (tmp_path / "out").exists()


def test_a_sound_model_passes(small):
    assert train.check_model(str(small), train.byte_tokenizer())[1] == 4600
    model = AutoModelForCausalLM.from_pretrained(small)
    (small / "model.safetensors").unlink()
    model.save_pretrained(small, max_shard_size="8KB")
    assert len(list(small.glob("*.safetensors"))) > 1
    assert train.check_model(str(small), train.byte_tokenizer())[1] == 4600
    # Tied weights may be in the files twice: more than is asked for is no reason to refuse.
    for path in small.glob("*.safetensors"):
        save_file(load_file(path) | {f"copy of {path.stem}": torch.zeros(9)}, path)
    assert train.check_model(str(small), train.byte_tokenizer())[1] == 4600


# --- text


SPECIAL = ["<|endoftext|>", "<|padding|>", "<s>", "</s>", "<|im_start|>"]
TEXTS = [f" {name} and{name}{name}\n" for name in SPECIAL] + [
    "\x00\x07\x1b[2J\x85\u2028\ufeff",
    "a\r\nb\rc",
    "é\u0301 😀",
]


def rows_of(texts: list[str]) -> train.datasets.Dataset:
    rows = {"prompt": texts, "chosen": [text + "1" for text in texts], "rejected": [text + "2" for text in texts]}
    return train.datasets.Dataset.from_dict(rows)


def test_special_tokens_in_text_are_data():
    tokenizer = train.byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["</s>", "<|im_start|>"]})
    pairs, counts = train.tokenize(rows_of(TEXTS), tokenizer, 512, 256)
    assert (counts["used"], counts["dropped_control"]) == (len(TEXTS), 0)
    control = set(tokenizer.all_special_ids)
    for text, prompt, *responses in zip(TEXTS, pairs.prompts, pairs.chosen, pairs.rejected, strict=True):
        assert tokenizer.decode(prompt) == text
        assert control.isdisjoint(prompt)
        for ids, end in zip(responses, "12", strict=True):
            assert tokenizer.decode(ids[:-1]) == text + end
            assert control.isdisjoint(ids[:-1])
            assert ids[-1] == tokenizer.eos_token_id


def test_text_that_a_vocabulary_takes_for_control_is_dropped_and_counted():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "abc▁12/<>s")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>")
    pairs, counts = train.tokenize(rows_of(["a b", "a</s>b", "a é"]), tokenizer, 64, 32)
    assert (pairs.rows, counts["dropped_control"], counts["used"]) == ([0, 2], 1, 2)


def write_rows(path: Path, rows: list) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_rows_keep_their_text_or_are_counted(tmp_path):
    rows: list = [{"prompt": text, "chosen": "a", "rejected": "b", "x": {"y": [1]}} for text in TEXTS]
    rows += [{"prompt": "x" * 10**7, "chosen": "a", "rejected": "b"}] * 2  # 10 MB
    rows += [{"prompt": value, "chosen": "a", "rejected": "b"} for value in (None, 3, ["x"], {"x": 1}, True, math.nan)]
    rows += [{"prompt": "p", "chosen": "a", "rejected": "b", "annotator": 7, "x": 10**400, "y": "[" * 999}]
    data = train.read_preferences(write_rows(tmp_path / "a.jsonl", rows))
    reasons = train.Counter(data["dropped"][:])
    assert reasons == {None: len(TEXTS) + 1, "text of more than 1,048,576 characters": 2, "field is not a string": 6}
    assert data["prompt"][: len(TEXTS)] == TEXTS
    last = data[len(data) - 1]
    assert (last["annotator"], last["x"]) == ("7", str(10**400))


def test_repeated_rows_are_in_one_split(tmp_path):
    rows = [{"prompt": f"p{i % 40}", "chosen": "a", "rejected": "b", "conversation": f"{i % 40}"} for i in range(400)]
    splits, summary = train.split_preferences(train.read_preferences(write_rows(tmp_path / "a.jsonl", rows)))
    seen = [set(rows["prompt"]) for rows in splits.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 40
    assert sum(summary["rows"].values()) == 400


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a\\ud800", "chosen": "b", "rejected": "c"}', "line 2: a lone surrogate"),
        ('{"\\uDFFF": 1}', "line 2: a lone surrogate"),
        ("[" * 10**5, "line 2: not JSON .*recursion"),
        ('{"x": ' + "1" * 5000 + "}", "line 2: not JSON .*4300 digits"),
        ('{"prompt": "\x01"}', "line 2: not JSON"),
    ],
)
def test_lines_that_are_no_data_are_named(line, message, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, line])
    with pytest.raises(train.UserError, match=message):
        train.read_preferences(path)


@pytest.mark.parametrize(
    ("unpacked", "message"),
    [(b"x" * (2**26 + 1), "line of more than 67108864 bytes"), ((b'{"x": "' + b"y" * 2**21 + b'"}\n') * 40, "expands")],
)
def test_a_gzip_bomb_is_bounded(unpacked, message, tmp_path):
    folder = tmp_path / "helpful-base"
    folder.mkdir()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(unpacked))
    assert (folder / "train.jsonl.gz").stat().st_size < 2**19
    with pytest.raises(train.UserError, match=message):
        train.read_preferences("hh", str(tmp_path))


def test_a_damaged_archive_is_named(tmp_path):
    folder = tmp_path / "helpful-base"
    folder.mkdir()
    whole = bytearray(gzip.compress(os.urandom(2000).hex().encode()))
    whole[60] ^= 255
    (folder / "train.jsonl.gz").write_bytes(whole)
    with pytest.raises(train.UserError, match=r"train\.jsonl\.gz, after line 0: cannot be read"):
        train.read_preferences("hh", str(tmp_path))


# --- judges


def completion(**changes: object) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": "m"}, "finish_reason": "stop"}
    top = [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -2.4}]
    choice["logprobs"] = {"content": [{"token": "m", "logprob": -0.1, "top_logprobs": top}]}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "j",
        "choices": [choice],
        "usage": usage,
    } | changes


def with_logprobs(*values: object) -> dict:
    whole = completion()
    whole["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [{"token": "m", "logprob": v} for v in values]
    return whole


def with_text(text: object) -> dict:
    whole = completion()
    whole["choices"][0] |= {"logprobs": None, "message": {"role": "assistant", "content": text}}
    return whole


UNREADABLE = {
    "nested": b"[" * 10**5,
    "nested inside": json.dumps(completion()).encode()[:-1]
    + b', "x": '
    + b'{"x":' * 10**4
    + b"1"
    + b"}" * 10**4
    + b"}",
    "a list": [],
    "a number": 3,
    "choices": completion(choices=3),
    "no message": completion(choices=[{}]),
    "log-prob above 0": with_logprobs(5.0),
    "log-prob huge": with_logprobs(1e308),
    "log-prob of 400 digits": with_logprobs(10**400),
    "log-prob not a number": with_logprobs(math.nan),
    "log-prob text": with_logprobs("x"),
    "log-probs of more than 1": with_logprobs(*[-0.1] * 50),
    "text is a list": with_text(["m"]),
    "text of megabytes": with_text("m" + " " * 3 * 10**6),
    "text is no text": with_text("\ud800"),
    "usage": completion(usage={"prompt_tokens": "many", "completion_tokens": -1}),
    "usage of 400 digits": completion(usage={"prompt_tokens": 10**400, "completion_tokens": 1}),
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(evaluate, "ATTEMPTS", 2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(path: Path, url: str) -> int:
    path.mkdir(exist_ok=True)
    for name in ("policy", "sft"):
        write_rows(path / f"{name}.jsonl", [{"instruction": f"q{i}", "output": name} for i in range(2)])
    files = ["--policy", f"{path}/policy.jsonl", "--baseline", f"{path}/sft.jsonl", "--output-dir", f"{path}/out"]
    return evaluate.main(["judge", *files, "--judge-url", url, "--judge-model", "j", "--concurrency", "1"])


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_answer_that_is_none_is_asked_for_again_and_then_missing(case, tmp_path, quick, monkeypatch, capfd):
    with serve() as server:
        monkeypatch.setattr(server.RequestHandlerClass, "answer", lambda self, *_: self.reply(200, UNREADABLE[case]))
        assert judge(tmp_path, server.url) == 2
        assert len(server.bodies) == 4
    captured = capfd.readouterr()
    assert "2 of 2 judgements are missing" in captured.err
    assert "Traceback" not in captured.err
    assert "unreadable answer" in captured.out
    assert (tmp_path / "out" / "cache.jsonl").read_text() == ""


def test_no_key_in_any_file_or_message(tmp_path, quick, monkeypatch, capfd):
    """The judge sends back the key that it was sent, wherever it can."""
    label = with_text("m")
    answers = {
        "echo": (200, label | {"model": KEY, "system_fingerprint": f"fp {KEY}"}),
        "text": (200, with_text(f"{KEY} is the key")),
        "400": (400, {"error": {"message": f"{KEY} " * 9, "type": KEY, "code": KEY}}),
        "401": (401, {"error": {"message": f"bad key {KEY}", "type": "x", "code": None}}),
        "500": (500, f"<html>{KEY}".encode()),
    }
    for name, (status, value) in answers.items():
        with serve() as server, monkeypatch.context() as patch:
            patch.setattr(server.RequestHandlerClass, "answer", lambda self, *_, s=status, v=value: self.reply(s, v))
            assert judge(tmp_path / name, server.url) == (0 if name == "echo" else 2)
            assert server.keys == {f"Bearer {KEY}"}
    for i, blank in enumerate(
        (KEY + "\n", KEY + " ", KEY + "é")
    ):  # such a header is refused, and quoted, by the client
        monkeypatch.setenv("OPENAI_API_KEY", blank)
        with serve() as server:
            assert judge(tmp_path / f"blank{i}", server.url) == 2
            assert server.bodies == []
    captured = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.name == "cache.jsonl"]) == len(answers)
    everything = [captured.out, captured.err, *(path.read_bytes().decode("latin-1") for path in files)]
    assert any("(key)" in text for text in everything)
    for text in everything:
        assert KEY not in text


def test_no_key_in_what_a_run_writes(one_process, tmp_path, quick, monkeypatch, capfd):
    """Every secret that the libraries know by name, over training, generation through a server, and all caches."""
    names = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")
    for name in names:
        monkeypatch.setenv(name, KEY)
    monkeypatch.setattr(train.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert train.main([*SMALL, "--sft-epochs", "0", "--seed", "5", "--output-dir", str(tmp_path / "run")]) == 0
    flags = ["--policy", str(one_process / "policy"), "--prompts", "2", "--output-dir", str(tmp_path / "answers")]
    with serve() as server:
        assert evaluate.main(["generate", *flags, "--url", server.url]) == 0
        assert server.keys == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"strength.json", "metrics.jsonl", "gamma.jsonl"} <= {path.name for path in files}
    assert any((tmp_path / "cache").rglob("*.arrow"))
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err


@pytest.mark.parametrize(
    "value", ["nan", "-5", "Mon, 99 Foo 99999999 99:99:99 GMT", "Mon, 01 Jan 99999999 00:00:00", "x" * 10**5]
)
def test_retry_after_is_never_an_error(value):
    assert not evaluate.retry_after(value) > 0


def test_labels_do_not_steer_the_terminal():
    assert evaluate.columns_of([("a\x1b[2J\n", "b")]) == r"a\x1b[2J\n  b"
    assert "\x1b" not in evaluate.markdown(["a\x1b"], [["b\x1b"]])


def test_a_price_is_no_formula(tmp_path):
    group = {"mean": 1.0, "low": 0.5, "high": 1.5}
    entry = {"groups": {"$20k to $30k {": {"n": 3, "small": False, "gamma": group}}}
    entry |= {"micro": {"gamma": group}, "macro": {"gamma": group}}
    evaluate.draw_subgroups({"income in $\\frac{$": entry}, ["gamma"], "margin", tmp_path / "f")
    assert "$20k to $30k {" in (tmp_path / "f.svg").read_text()
