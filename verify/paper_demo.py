"""The n = 1000 truncation inside train.py: the tiny preset with the paper's series beside the exact form.

The same SFT checkpoint, reference pass, data order and settings; only log E differs. `paper_training` explains the
mechanism on a policy that can be read; here it is the whole program, a language model from SFT to held-out pairs.
"""

import contextlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import mixdpo
import train
from verify.paper_numerics import truncated_log_prob
from verify.table import Row, holds, reported


class TruncatedGamma(mixdpo.Gamma):
    """Gamma with App. C.1's finite sum in the place of the closed form."""

    def log_choice_prob(self, delta_r: Tensor) -> Tensor:
        dtype = torch.promote_types(delta_r.dtype, torch.float32)
        return truncated_log_prob(delta_r.to(dtype), self.concentration.to(dtype), self.rate.to(dtype))


@cache
def runs() -> dict[str, list[dict[str, float]]]:
    """metrics.jsonl of both runs."""
    original, found = train.make_strength, {}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        shared = ["--preset", "tiny", "--dist", "gamma", "--max-pairs", "1280", "--sft-dir", f"{folder}/sft"]
        shared += ["--reference-cache", f"{folder}/reference.safetensors"]
        for name, family in (("exact", mixdpo.Gamma), ("n = 1000", TruncatedGamma)):
            train.make_strength = lambda config, device="cpu", family=family: family(device=device)
            try:
                if train.main([*shared, "--output-dir", f"{folder}/{family.__name__}"]):
                    raise RuntimeError("train.py refused the demo")
            finally:
                train.make_strength = original
            text = (Path(folder) / family.__name__ / "metrics.jsonl").read_text(encoding="utf-8")
            found[name] = [json.loads(line) for line in text.splitlines()]
    return found


def check(full: bool) -> list[Row]:
    source = "App. C.1, train.py --preset tiny"
    rows, last = [], {}
    for name, lines in runs().items():
        updates = [line for line in lines if "train/loss" in line]
        evaluations = [line for line in lines if "eval/loss" in line]
        last[name] = evaluations[-1]["eval/rewards/accuracies"]
        rows.append(reported(f"{name}: loss of update 1, where policy equals reference", source, "0.6931 (log 2)",
                             updates[0]["train/loss"]))  # fmt: skip
        margins = ", ".join(f"{line['eval/rewards/margins']:+.3f}" for line in evaluations)
        rows.append(reported(f"{name}: held-out reward margin at each evaluation", source, "rises from 0", margins))
        rows.append(reported(f"{name}: held-out accuracy after {len(updates)} updates", source, "-", last[name]))
    gap = f"{last['exact']:.3f} against {last['n = 1000']:.3f}"
    rows.append(holds("the exact form ends with the higher held-out accuracy", source, "exact higher", gap,
                      last["exact"] > last["n = 1000"]))  # fmt: skip
    rows.append(holds("the exact form learns: held-out accuracy above 0.65", source, "> 0.65", f"{last['exact']:.3f}",
                      last["exact"] > 0.65))  # fmt: skip
    return rows
