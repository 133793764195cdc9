"""python -m verify.bench_gpu: the paper's settings on one GPU, with random weights of real shapes.

Llama-3.2-1B and Pythia-2.8B shapes, 64 pairs of 128/64 tokens with the demo's text repeated to HH's lengths, bfloat16
over float32 master weights: examples per second, model FLOPs utilisation on tokens that are computed once (6 FLOPs per
parameter and token, the head on response tokens only, and attention over the places that may be seen), peak memory, the
losses' overhead, and from these the time of one run of 55,000 pairs and of the nine runs of Table 2, with the reference
scored in strict float32, in TF32 and in bfloat16. Written to verify/results/bench_gpu.json. Without a GPU only
`--shape tiny` runs, which measures nothing but that the script works.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import train
from verify.__main__ import RESULTS, write

SHAPES = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=2048, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    ),
    "pythia-2.8b": GPTNeoXConfig(
        vocab_size=50_304, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=0,
    ),
    "tiny": LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    ),
}  # fmt: skip
PAIRS, RUN = 64, 55_000
# Dense bfloat16 tensor-core peaks of the makers' data sheets, FLOP/s.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
DISTS = ("dpo", "lognormal", "gamma")


def pairs_like_hh(vocabulary: int) -> train.Pairs:
    """Random tokens; lengths as HH's after 128/64 truncation: prompts of 20 to 64, responses of 8 to 64."""
    rng = np.random.default_rng(0)

    def column(low: int) -> list[list[int]]:
        return [rng.integers(1, vocabulary, rng.integers(low, 65)).tolist() for _ in range(PAIRS)]

    return train.Pairs(column(20), column(8), column(8), list(range(PAIRS)))


def flops(model: torch.nn.Module, pairs: train.Pairs) -> float:
    """Of one step, forward and backward, every token once."""
    config: Any = model.config
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    total = 6.0 * linear * sum(pairs.lengths)
    total += 6.0 * head.weight.numel() * sum(len(c) + len(r) for c, r in zip(pairs.chosen, pairs.rejected, strict=True))
    for prompt, chosen, rejected in zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True):
        p, c, r = len(prompt), len(chosen), len(rejected)
        seen = p * p / 2 + c * (p + c / 2) + r * (p + r / 2)
        total += 12.0 * seen * config.hidden_size * config.num_hidden_layers
    return total


def timed(step: Any, rounds: int, device: torch.device) -> float:
    seconds = []
    for number in range(rounds + 2):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def measure(shape: str, world: train.World, rounds: int) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    pairs, index = pairs_like_hh(SHAPES[shape].vocab_size), list(range(PAIRS))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32).save_pretrained(folder)
        result: dict[str, Any] = {"seconds": {}, "reference": {}}
        config = train.parse_config([])
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(SHAPES[shape])
        parameters = sum(p.numel() for p in plain.parameters())
        budget = train.micro_batch_tokens(SHAPES[shape], parameters, world)
        config = dataclasses.replace(config, micro_batch_tokens=max(budget, 2 * config.max_length))
        for dtype in ("float32", "tfloat32", "bfloat16"):
            reference = train.load_model(folder, dtype, world, pairs)
            torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tfloat32" else "ieee"
            size = 4 * config.micro_batch_tokens

            def score(model: torch.nn.Module = reference, size: int = size) -> None:
                train.score_all(model, pairs, PAIRS, size, world, "reference")

            result["reference"][dtype] = timed(score, rounds, world.device)
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            del reference, score
        for name in DISTS:
            network = train.load_model(folder, "bfloat16", world, pairs)
            strength = train.make_strength(dataclasses.replace(config, dist=name), world.device)
            groups = [{"params": list(m.parameters()), "lr": 5e-7} for m in (network, strength) if list(m.parameters())]
            optimizer, _schedule = train.optimizer_for(groups, 0)
            logps = torch.zeros(PAIRS, 2, device=world.device)
            settings = dataclasses.replace(config, dist=name)
            if cuda:
                torch.cuda.reset_peak_memory_stats()

            def step(network: Any = network, strength: Any = strength, optimizer: Any = optimizer) -> None:
                train.preference_gradients(settings, 1, index, pairs, logps, network, strength, world)  # noqa: B023
                train.clip_policy(network, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            result["seconds"][name] = timed(step, rounds, world.device)
            del network, optimizer, step
    seconds, updates = result["seconds"], RUN / PAIRS
    sweep = updates * (seconds["dpo"] + 4 * seconds["lognormal"] + 4 * seconds["gamma"])
    name = torch.cuda.get_device_name() if cuda else "cpu"
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    work = flops(plain, pairs)
    return result | {
        "parameters": parameters,
        "micro_batch_tokens": config.micro_batch_tokens,
        "examples_per_second": PAIRS / seconds["dpo"],
        "model_flops_utilisation": work / seconds["dpo"] / peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "overhead": {n: seconds[n] / seconds["dpo"] for n in DISTS[1:]},
        "hours_of_one_run": updates * seconds["dpo"] / 3600,
        "hours_of_nine_runs": {d: (updates * t + sweep) / 3600 for d, t in result["reference"].items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m verify.bench_gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama-3.2-1b", "pythia-2.8b"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_gpu.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and args.shape != ["tiny"]:
        print(f"bench_gpu: error: no GPU for --shape {' '.join(args.shape)}: use one, or --shape tiny", file=sys.stderr)
        return 2
    train.quiet_libraries()
    with train.start_processes() as world:
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
        result: dict[str, Any] = {"device": device, "torch": torch.__version__}
        result |= {shape: measure(shape, world, args.rounds) for shape in args.shape}
    write(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
