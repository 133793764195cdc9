"""Arithmetic of the paper's tables and settings, from the printed figures."""

import math

import torch

import mixdpo
from verify.table import Row, holds, near, reported

# WR and LC-WR of PRISM, Community Alignment, Anthropic HH, each Pythia-2.8B then Llama-3.2-1B, in print order.
TABLE_1 = {
    "DPO": (51.09, 50.42, 64.96, 64.33, 35.85, 36.87, 70.69, 66.53, 69.29, 69.34, 71.58, 71.08),
    "LogNormal, lr 1e-4": (59.61, 58.28, 67.56, 66.73, 41.18, 41.83, 70.75, 65.58, 71.65, 72.01, 73.82, 73.84),
    "Gamma, lr 1e-4": (62.29, 61.39, 67.88, 66.97, 47.64, 46.28, 67.53, 63.72, 58.24, 56.92, 54.85, 52.83),
}
TABLE_2 = {
    "DPO": (58.67, 55.57, 65.89, 64.20, 38.00, 28.76, 60.61, 54.39, 69.63, 68.44, 75.33, 75.18),
    "LogNormal, lr 1e-4": (61.00, 59.59, 65.67, 64.04, 43.33, 35.90, 69.02, 62.99, 65.32, 64.15, 76.83, 76.78),
    "Gamma, lr 1e-4": (64.00, 62.40, 68.33, 66.67, 47.00, 41.53, 60.61, 55.16, 58.08, 53.50, 61.42, 59.12),
}


def check(full: bool) -> list[Row]:
    updates = 55_000 / 64
    rows = [
        holds("evaluations 'every 1,984 updates' in one epoch of 55,000 pairs at batch 64", "App. E",
              "none: 1,984 exceeds the run", f"{int(updates // 1984)} ({updates:.0f} updates)", updates < 1984),
        near("1,984 as examples: 31 batches of 64, 2,000 rounded down", "App. E", 1984, 2000 // 64 * 64, 0),
    ]  # fmt: skip
    for method, first in TABLE_1.items():
        gaps = [b - a for a, b in zip(first, TABLE_2[method], strict=True)]
        largest = max(gaps, key=abs)
        rows.append(
            reported(f"{method}: cells of Table 1 that Table 2 repeats with another value", "Tables 1 and 2", "0 of 12",
                     f"{sum(g != 0 for g in gaps)} of 12, largest gap {largest:+.2f} points")
        )  # fmt: skip
    for name, table in (("Table 1", TABLE_1), ("Table 2", TABLE_2)):
        gain = table["Gamma, lr 1e-4"][0] - table["DPO"][0]
        rows.append(
            near("'+11.2 points on Pythia-2.8B' (PRISM, WR, Gamma - DPO) in Table 1", "abstract", 11.2, gain, 0.05)
            if name == "Table 1"
            else reported("the same gain in Table 2", "abstract", "11.2", f"{gain:.2f}")
        )
    gamma, lognormal = mixdpo.Gamma(dtype=torch.float64), mixdpo.LogNormal(dtype=torch.float64)
    source = "Sec. 4.3: 'both yielding E[beta] = 0.1'"
    rows += [
        near("E[beta] of Gamma(2, 16.7)", source, 2 / 16.7, gamma.mean.item(), 1e-12),
        near("E[beta] of LogNormal(-2.3, 0.6)", source, math.exp(-2.3 + 0.18), lognormal.mean.item(), 1e-12),
        near("median of LogNormal(-2.3, 0.6), which is 0.1", source, 0.1, math.exp(lognormal.loc.item()), 5e-4),
    ]
    for name, strength in (("Gamma(2, 16.7)", gamma), ("LogNormal(-2.3, 0.6)", lognormal)):
        ratio = strength.mean.item() / 0.1
        delta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        quadrature = mixdpo.LogNormal(estimator="quadrature", dtype=torch.float64)
        model = strength if name.startswith("Gamma") else quadrature
        (slope,) = torch.autograd.grad(model.log_choice_prob(delta), delta)
        rows.append(
            near(f"{name} against DPO at beta = 0.1: gradient of every pair at the start, over DPO's", source, ratio,
                 slope.item() / 0.05, 1e-9, "a comparison at another mean strength")
        )  # fmt: skip
    return rows
