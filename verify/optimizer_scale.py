"""How far a strength parameter can travel in one epoch: RMSprop is scale-free, so the learning rate decides.

With a gradient of constant sign and size RMSprop's t-th step is lr / sqrt(1 - 0.99^t), whatever the size: 860 steps
move a raw parameter by 984 lr, of which 124 are the start. Hence at the policy's lr of 5e-7 nothing is learned, and
the paper's three rates differ by what they can reach; reach is measured by pushing the variance up, or down, at every
update, from the fixed settings, through softplus. (RMSprop as in App. E, without warm-up. Gradients that first vanish
and then grow can do better by up to a factor of 10 over a few updates; real ones, which change sign, do worse.)
"""

import torch

import mixdpo
from verify.exact import Strength
from verify.table import Row, at_most, near, reported

UPDATES = 860
RATES = (5e-7, 1e-5, 1e-4, 1e-3)
SOURCE = "Sec. 4.3, App. E"


def travel(lr: float, size: float) -> float:
    """Distance of one float64 parameter after an epoch of gradients of one size."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.RMSprop([p], lr=lr)
    for _ in range(UPDATES):
        p.grad = torch.full_like(p, -size)
        optimizer.step()
    return p.item()


def reach(strength: Strength, lr: float, up: bool) -> tuple[float, float, float]:
    """Mean, cv and variance after an epoch whose every update pushed the variance up, or down."""
    optimizer = torch.optim.RMSprop(strength.parameters(), lr=lr)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        (strength.variance * (-1 if up else 1)).backward()
        optimizer.step()
    return strength.mean.item(), strength.cv.item(), strength.variance.item()


def check(full: bool) -> list[Row]:
    predicted = sum((1 - 0.99**t) ** -0.5 for t in range(1, UPDATES + 1))
    rows = [
        near(f"travel in 860 updates over lr = {lr:g}, constant gradient of 1e-2", SOURCE, predicted,
             travel(lr, 1e-2) / lr, 1e-3 * predicted, "eps = 1e-8 of RMSprop")
        for lr in RATES
    ]  # fmt: skip
    rows.append(
        near("the same with a gradient 100 times as large: RMSprop is scale-free", SOURCE, predicted,
             travel(1e-4, 1.0) / 1e-4, 1e-3 * predicted)
    )  # fmt: skip
    for name, make in (
        ("Gamma(2, 16.7)", lambda: mixdpo.Gamma(dtype=torch.float64)),
        ("LogNormal(-2.3, 0.6)", lambda: mixdpo.LogNormal(dtype=torch.float64)),
    ):
        start = make()
        for lr in RATES:
            (low_mean, low_cv, low), (high_mean, high_cv, high) = reach(make(), lr, False), reach(make(), lr, True)
            if lr == RATES[0]:
                change = max(abs(high_mean / start.mean.item() - 1), abs(high_cv / start.cv.item() - 1))
                rows.append(
                    at_most(f"{name}: largest relative change of mean or cv in one epoch at lr 5e-7", SOURCE,
                            "nothing is learned", change, 1e-3)
                )  # fmt: skip
            rows.append(
                reported(f"{name}: reach of (mean, cv) in one epoch at lr {lr:g}", SOURCE,
                         f"start ({start.mean.item():.4f}, {start.cv.item():.4f})",
                         f"({low_mean:.4f}, {low_cv:.4f}) to ({high_mean:.4f}, {high_cv:.4f}); variance "
                         f"{low / start.variance.item() - 1:+.1%} to {high / start.variance.item() - 1:+.1%}")
            )  # fmt: skip
    return rows
