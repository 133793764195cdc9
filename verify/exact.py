"""The distributions of mixdpo.py at exactly given parameter values: the same methods, without softplus in between."""

import torch
from torch import Tensor

import mixdpo

Strength = mixdpo.PointMass | mixdpo.LogNormal | mixdpo.Gamma


class ExactGamma(mixdpo.Gamma):
    def __init__(self, concentration: Tensor, rate: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.given = (concentration, rate)

    concentration = property(lambda self: self.given[0])
    rate = property(lambda self: self.given[1])


class ExactLogNormal(mixdpo.LogNormal):
    def __init__(
        self, loc: Tensor, scale: Tensor, estimator: str = "quadrature", samples: int = 16, nodes: int = 64
    ) -> None:
        torch.nn.Module.__init__(self)
        self.given = (loc, scale)
        self.estimator, self.samples, self.nodes = estimator, samples, nodes

    loc = property(lambda self: self.given[0])
    scale = property(lambda self: self.given[1])
