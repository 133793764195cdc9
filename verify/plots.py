"""Figure style, and the colours used throughout: Okabe and Ito's, told apart by colour-blind readers."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "svg.hashsalt": "verify",  # the same figure gives the same bytes
    "svg.fonttype": "none",
}


plt.rcParams.update(STYLE)


def panels(columns: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    return figure, list(axes[0])


def save(figure: Figure, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.png", dpi=100)
    figure.savefig(folder / f"{name}.svg", dpi=100, metadata={"Date": None})
    plt.close(figure)
