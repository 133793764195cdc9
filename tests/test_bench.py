"""The benchmarks run, and compare log-probs before they time."""

import json

import pytest

import train
from mixdpo import Gamma, LogNormal, PointMass
from verify import bench, bench_gpu


def test_the_report_shows_the_saved_results():
    saved = json.loads((bench.RESULTS / "bench.json").read_text(encoding="utf-8"))
    assert (bench.RESULTS / "bench.md").read_text(encoding="utf-8") == bench.markdown(saved)
    for model in saved["models"].values():
        assert all(
            apart < 1e-3
            for name, apart in model["logps_apart"].items()
            if "bfloat16" not in name and "defaults" not in name
        )


def test_it_measures_every_candidate(monkeypatch, tmp_path):
    """At a size that measures nothing: every candidate takes the same steps from the same log-probs."""
    for name, value in {"PAIRS": 6, "HIDDEN": 32, "LAYERS": 1, "VOCABULARY": 300, "MODELS": ("llama",)}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.delenv("MIXDPO_DATA", raising=False)
    monkeypatch.setattr(bench, "own_process", lambda *arguments, ranks=1: 2**20)
    bench.make_models(tmp_path)
    with train.start_processes() as world:
        measured = bench.measure_model("llama", tmp_path / "llama", world, 1, False)
    apart = measured["logps_apart"]
    assert all(apart[name] < 1e-3 for name in ("ours, no cache", "ours, cached"))
    assert 0 < apart["ours, cached, bfloat16"] < 3
    assert measured["tokens"]["each once"] < measured["tokens"]["without padding"] <= measured["tokens"]["padded"]
    assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in measured["over_padded"].values())
    assert measured["over_padded"]["padded"]["median"] == 1
    sweep = measured["sweep"]
    assert len(sweep["seconds"]["padded"]) == len(sweep["seconds"]["ours"]) == 9
    whole = sweep["seconds"]["reference pass"] + sum(sweep["seconds"]["ours"])
    assert sweep["over_padded"] == pytest.approx(whole / sum(sweep["seconds"]["padded"]), rel=1e-2)


def test_the_losses_are_compared_with_dpo(monkeypatch, tmp_path):
    """The flags' default is Gamma: what the ratios are over has to be asked for, and comes first."""
    for name, value in {"PAIRS": 4, "HIDDEN": 32, "LAYERS": 1, "VOCABULARY": 300, "MODELS": ("llama",)}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.delenv("MIXDPO_DATA", raising=False)
    bench.make_models(tmp_path)
    made, original = [], bench.ours
    monkeypatch.setattr(bench, "ours", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    seconds = {"dpo": [1.0], "lognormal": [2.0], "gamma": [3.0]}
    monkeypatch.setattr(bench, "in_turn", lambda steps, rounds: {n: seconds[n] for n in steps})
    with train.start_processes() as world:
        measured = bench.measure_losses(tmp_path / "llama", world, 1)
    assert [type(m["strength"]) for m in made] == [PointMass, LogNormal, Gamma]
    assert {n: r["median"] for n, r in measured.items()} == {"lognormal": 2, "gamma": 3}


def test_gpu_benchmark_needs_a_gpu_or_the_tiny_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main([]) == 2
    assert "no GPU for --shape llama-3.2-1b pythia-2.8b" in capsys.readouterr().err
    assert bench_gpu.main(["--shape", "tiny", "--rounds", "1", "--output", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())["tiny"]
    assert result["examples_per_second"] > 0
    assert result["model_flops_utilisation"] is None
    assert set(result["hours_of_nine_runs"]) == {"float32", "tfloat32", "bfloat16"}


def test_flops_of_a_model_counted_by_hand():
    """Two layers of 4 h^2 + 3 h i products, a head on response tokens alone, attention over the places seen."""
    shape = bench_gpu.SHAPES["tiny"]
    with bench_gpu.torch.device("meta"):
        model = bench_gpu.AutoModelForCausalLM.from_config(shape)
    pairs = train.Pairs([[1] * 10], [[1] * 4], [[1] * 6], [0])
    body = 2 * (4 * 64 * 64 + 3 * 64 * 128) * 20
    head = 300 * 64 * 10
    seen = 10 * 10 / 2 + 4 * (10 + 4 / 2) + 6 * (10 + 6 / 2)
    assert bench_gpu.flops(model, pairs) == pytest.approx(6 * (body + head) + 12 * seen * 64 * 2)
