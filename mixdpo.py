"""MixDPO: Direct Preference Optimization with a random preference strength, in one file.

DPO models a choice as sigma(beta * delta_r) with one fixed beta. MixDPO (arXiv 2601.06180) makes beta a random
variable with a learned distribution, a mixed logit model, and minimises -log E_beta[sigma(beta * delta_r)].

To use it elsewhere copy this file; it needs torch and the standard library. In a training loop:

    strength = Gamma(concentration=2.0, rate=16.7)               # or LogNormal(), or PointMass() for plain DPO
    optimizer = torch.optim.RMSprop([
        {"params": policy.parameters(), "lr": 5e-7},
        {"params": strength.parameters(), "lr": 1e-4},           # RMSprop is scale-free: beta needs its own lr
    ])
    losses, chosen_rewards, rejected_rewards = mixdpo_loss(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, strength)
    losses.mean().backward()

From the paper to this file (delta_r = r(x, y_w) - r(x, y_l), r = log pi_theta(y|x) - log pi_ref(y|x), Eq. 2):

    Eq. 1        dpo_loss                          -log sigma(beta * delta_r)
    Eq. 3        mixdpo_loss                       -log E_beta[sigma(beta * delta_r)]
    Eqs. 4-6     Gamma.log_choice_prob             closed form; Eq. 14 (a misprint of Eq. 4) and the n = 1000
                                                   truncation of App. C.1 are not used, see gamma_log_tail
    Eqs. 7, 8    LogNormal(estimator="monte_carlo")   K reparameterised draws per pair, log of their mean
    App. B       softplus for every positive parameter
    not there    LogNormal(estimator="quadrature"), posterior_mean

Conventions: log-probs are sums over response tokens, in nats. Everything is computed in the widest of float32, the
dtype of the input and the dtype of the parameters, and returned in it: bfloat16 log-probs give float32 losses.
delta_r may have any shape and any value: +-inf give the limits, 0 and -inf, NaN gives NaN.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Gamma", "LogNormal", "PointMass", "dpo_loss", "mixdpo_loss"]


# --- numerics: pure functions on tensors ------------------------------------------------------------------------------


def _alternating_weights(terms: int) -> list[float]:
    """Weights w_n with sum_{n>=0} (-1)^n a_n ~ sum_{n<terms} w_n a_n (signs included), from exact integers.

    Algorithm 1 of Cohen, Rodriguez Villegas and Zagier, Convergence acceleration of alternating series, Experimental
    Mathematics 9 (2000). If a_n are the moments of a positive measure on [0, 1] the relative error is below
    2 (3 + sqrt 8)^-terms: 1.3e-9 for 12 terms, 2.9e-17 for 22.
    """
    previous, d = 1, 3  # d = T_terms(3), the Chebyshev polynomial, by its recurrence
    for _ in range(terms - 1):
        previous, d = d, 6 * d - previous
    weights, b, c = [], Fraction(-1), Fraction(-d)
    for n in range(terms):
        c = b - c
        weights.append(float(c / d))
        b *= Fraction((n + terms) * (n - terms), 1) / (Fraction(2 * n + 1, 2) * (n + 1))
    return weights


# Below the rounding of each dtype.
_WEIGHTS = {torch.float32: _alternating_weights(12), torch.float64: _alternating_weights(22)}


def gamma_log_tail(magnitude: Tensor, concentration: Tensor, rate: Tensor) -> Tensor:
    """log E[sigma(-beta * a)] <= -log 2 for beta ~ Gamma(concentration k, rate); a = magnitude >= 0, finite, any shape.

    With u = a / (rate + a) in [0, 1], Eq. 5 of the paper is

        E[sigma(-beta a)] = (rate / a)^k Phi(-1, k, 1 + rate / a) = (1 + a / rate)^-k * sum_n (-1)^n (1 + n u)^-k.

    (1 + n u)^-k = int_0^1 x^n dmu(x) with mu > 0 (x = e^(-u t), t ~ Gamma(k, 1)), so the acceleration above applies for
    every k > 0, also for k <= 1, where the two Hurwitz zeta series of Eq. 6 diverge. Both factors keep full relative
    accuracy: the first through log1p, the second because the series lies in [1/2, 1). Relative error of the result and
    of its first derivatives, measured over a in [1e-9, 1e5], k in [1e-2, 1e3], rate in [1e-1, 1e3] by `nox -s verify`.
    concentration and rate have no dimensions; torch.func.vmap takes one of each per element.
    """
    # Above the cap a / rate could overflow, while 1 + rate / a is 1 to the last bit: the logarithm is split there.
    cap = math.sqrt(torch.finfo(magnitude.dtype).max)
    bounded = magnitude.clamp(max=cap)
    log_base = torch.log1p(bounded / rate) + torch.log(magnitude.clamp(min=cap) / cap)
    u = bounded / (rate + bounded)
    weights = torch.tensor(_WEIGHTS[magnitude.dtype], dtype=magnitude.dtype, device=magnitude.device)
    n = torch.arange(len(weights), dtype=magnitude.dtype, device=magnitude.device)
    terms = torch.exp(-concentration * torch.log1p(n * u.unsqueeze(-1)))
    return -concentration * log_base + torch.log((weights * terms).sum(-1))


def _lognormal_log_sigmoid(magnitude: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """log sigma(-a * exp(loc + scale * noise)), shape of noise: magnitude.shape + (n,)."""
    magnitude = magnitude.unsqueeze(-1)
    # An exponent above this would make a * beta infinite and its gradient 0 * inf; sigma(-a beta) is 0 long before.
    largest = math.log(torch.finfo(magnitude.dtype).max) - 1 - magnitude.detach().clamp(min=1).log()
    return F.logsigmoid(-magnitude * torch.exp(torch.minimum(loc + scale * noise, largest)))


def lognormal_log_tail_monte_carlo(magnitude: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """log (1/K) sum_k sigma(-a * exp(loc + scale * noise_k)), Eq. 8; noise: standard normal, magnitude.shape + (K,)."""
    log_sigmoid = _lognormal_log_sigmoid(magnitude, loc, scale, noise)
    return torch.logsumexp(log_sigmoid, -1) - math.log(noise.shape[-1])


def lognormal_log_tail_quadrature(magnitude: Tensor, loc: Tensor, scale: Tensor, nodes: int) -> Tensor:
    """log int sigma(-a * exp(loc + scale * x)) phi(x) dx by the trapezoid rule on mode +- 8, `nodes` nodes.

    The logarithm of the integrand is concave with second derivative <= -1, so that beyond 8 on either side of the mode
    lies less than 1e-14 of the integral, also in the far tail, where the mass moves to small beta. The integrand is
    analytic for |Im x| < pi / (2 scale), so the error falls as exp(-pi^2 / (scale * step)), step = 16 / (nodes - 1):
    64 nodes leave less than 1e-10 in log T for scale <= 1 and a * exp(loc) up to 5e3; above scale 1 take 64 * scale.
    """
    half_width = 8.0
    with torch.no_grad():
        # The mode solves x + scale * z * sigma(z) = 0, z = a exp(loc + scale x). With sigma(z) = 1 that is Lambert's W,
        # which starts three Newton steps; the centre need not be exact and carries no gradient.
        log_a = magnitude.log()
        log_w = F.softplus(log_a + loc + 2 * scale.log())
        centre = -log_w * (1 - torch.log1p(log_w) / (2 + log_w)) / scale
        for _ in range(3):
            z = torch.exp(log_a + loc + scale * centre)
            slope = scale * z * torch.sigmoid(z)
            centre = centre - (centre + slope) / (1 + scale * slope * (1 + z * torch.sigmoid(-z)))
        grid = torch.linspace(-half_width, half_width, nodes, dtype=magnitude.dtype, device=magnitude.device)
        x = centre.unsqueeze(-1) + grid
    step = 2 * half_width / (nodes - 1)
    log_integrand = _lognormal_log_sigmoid(magnitude, loc, scale, x) - x.square() / 2
    return torch.logsumexp(log_integrand, -1) + math.log(step / math.sqrt(2 * math.pi))


def _log_choice_prob(delta_r: Tensor, log_tail: Callable[[Tensor], Tensor]) -> Tensor:
    """log E[sigma(beta delta_r)] from log_tail(a) = log E[sigma(-beta a)]: the tail T itself, or log(1 - T).

    One function of |delta_r| serves both signs, so both tails keep relative accuracy and p(d) + p(-d) = 1.
    """
    # Not torch.abs: its gradient at 0 is 0, and delta_r is exactly 0 for every pair at the first step of DPO.
    magnitude = torch.where(delta_r < 0, -delta_r, delta_r)
    infinite = torch.isinf(magnitude)
    log_t = log_tail(torch.where(infinite, torch.ones_like(magnitude), magnitude))
    log_t = torch.where(infinite, torch.full_like(log_t, -math.inf), log_t)
    return torch.where(delta_r < 0, log_t, torch.log1p(-torch.exp(log_t)))


def _tilted_mean(mean: Tensor, log_prob: Tensor, log_tilted: Tensor) -> Tensor:
    """E[beta | choice] = E[beta] * E'[sigma] / E[sigma], E' under the density proportional to beta * p(beta)."""
    impossible = torch.isneginf(log_prob)  # delta_r = -inf: all mass is at beta = 0
    return mean * torch.where(impossible, log_prob, log_tilted - log_prob).exp()


# --- losses -----------------------------------------------------------------------------------------------------------


def _widest(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = f"{tensor.dtype} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a floating-point tensor, got {got}: pass log-probs, not token ids or counts")


def _implicit_rewards(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor]:
    """r(x, y) = log pi_theta(y|x) - log pi_ref(y|x) (Eq. 2) of the chosen and the rejected responses, after checks."""
    named = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    for name, logps in named.items():
        _check_float(name, logps)
        if logps.shape != policy_chosen_logps.shape:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in named.items())
            raise ValueError(f"log-probs must have one shape, (batch,), got {shapes}: one sum per response each")
    # Widened before the subtraction: log-probs are large and nearly equal, and their difference is the signal.
    dtype = _widest(*named.values())
    chosen = policy_chosen_logps.to(dtype) - reference_chosen_logps.to(dtype)
    rejected = policy_rejected_logps.to(dtype) - reference_rejected_logps.to(dtype)
    return chosen, rejected


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain DPO (Eq. 1): -log sigma(beta * delta_r), with optional label smoothing.

    Args:
        policy_chosen_logps, policy_rejected_logps: log pi_theta(y|x) in nats, summed over response tokens, (batch,).
        reference_chosen_logps, reference_rejected_logps: the same under the fixed reference model.
        beta: strength of preference, > 0.
        label_smoothing: probability in [0, 0.5) that a label is flipped (conservative DPO); the loss is then
            -(1 - s) log sigma(beta delta_r) - s log sigma(-beta delta_r).

    Returns:
        losses (batch,), not reduced; chosen_rewards and rejected_rewards (batch,) = beta * r(x, y), detached.

    Raises:
        ValueError: a value out of range, log-probs of different shapes, or an integer tensor.
    """
    _check_positive("beta", beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}: at 0.5 labels carry no information"
        )
    chosen, rejected = _implicit_rewards(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    logits = beta * (chosen - rejected)
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses, (beta * chosen).detach(), (beta * rejected).detach()


def mixdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    strength: "PointMass | LogNormal | Gamma",
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """MixDPO (Eq. 3): -log E_beta[sigma(beta * delta_r)], differentiable in the policy and in the strength parameters.

    Args:
        the four log-probs: as for dpo_loss.
        strength: the distribution of beta. PointMass(beta) gives dpo_loss(..., beta) exactly.
        noise: only for LogNormal with Monte Carlo: its standard normal draws, (batch, samples). Drawn when None.

    Returns:
        losses (batch,), not reduced; chosen_rewards and rejected_rewards (batch,) = E[beta] * r(x, y), detached.

    Raises:
        ValueError: log-probs of different shapes, or an integer tensor.
    """
    chosen, rejected = _implicit_rewards(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    if not hasattr(strength, "log_choice_prob"):
        raise ValueError(
            f"strength must be a PointMass, LogNormal or Gamma, got {strength!r}: for a number use dpo_loss"
        )
    if noise is None:
        losses = -strength.log_choice_prob(chosen - rejected)
    elif isinstance(strength, LogNormal):
        losses = -strength.log_choice_prob(chosen - rejected, noise=noise)
    else:
        raise ValueError(f"noise is only for LogNormal, got it with {type(strength).__name__}: leave it out")
    mean = strength.mean.detach().to(losses.dtype)
    return losses, mean * chosen.detach().to(losses.dtype), mean * rejected.detach().to(losses.dtype)


# --- distributions of the strength beta -------------------------------------------------------------------------------


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value}")


def _softplus_inverse(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def _softplus(raw: Tensor) -> Tensor:
    """log(1 + e^raw), shape (1,) -> (), float32 or wider. F.softplus would switch to the identity at 20: 2e-9 off."""
    raw = raw.squeeze(0).to(torch.promote_types(torch.float32, raw.dtype))
    # The floor keeps 1 / value and value * cap finite when a run has driven a parameter to zero.
    return torch.logaddexp(raw, torch.zeros_like(raw)).clamp(min=math.sqrt(torch.finfo(raw.dtype).tiny))


def _hold(
    module: nn.Module,
    name: str,
    value: float,
    learnable: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Registers a value as a parameter, or as a buffer."""
    # Shape (1,): fully_shard refuses parameters without a dimension.
    tensor = torch.tensor([value], device=device, dtype=dtype or torch.float32)
    if learnable:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)


def _widen(delta_r: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    _check_float("delta_r", delta_r)
    dtype = _widest(delta_r, *parameters)
    return tuple(tensor.to(dtype) for tensor in (delta_r, *parameters))


class PointMass(nn.Module):
    """beta fixed at one value > 0, in a buffer: plain DPO as a distribution. Nothing is learned.

    Equal to dpo_loss with the same beta, up to the rounding of beta to `dtype` (1.5e-8 for 0.1 in float32).
    """

    beta: Tensor

    def __init__(
        self, beta: float = 0.1, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        _check_positive("beta", beta)
        self.register_buffer("beta", torch.tensor(beta, device=device, dtype=dtype or torch.float32))

    @property
    def mean(self) -> Tensor:
        """E[beta], a tensor without dimensions."""
        return self.beta.to(_widest(self.beta))

    @property
    def cv(self) -> Tensor:
        """sd / mean = 0, and so is the variance; a tensor without dimensions."""
        return torch.zeros_like(self.mean)

    variance = cv

    def log_choice_prob(self, delta_r: Tensor) -> Tensor:
        """log sigma(beta * delta_r) (Eq. 1), in the shape of delta_r."""
        delta_r, beta = _widen(delta_r, self.beta)
        return F.logsigmoid(beta * delta_r)

    def posterior_mean(self, delta_r: Tensor) -> Tensor:
        """E[beta | this choice was made] = beta, in the shape of delta_r."""
        delta_r, beta = _widen(delta_r, self.beta)
        return beta.expand_as(delta_r)

    def extra_repr(self) -> str:
        return f"beta={self.beta.item():.6g}"


class LogNormal(nn.Module):
    """beta = exp(loc + scale * eps), eps ~ N(0, 1) (Sec. 3.3, App. B).

    Args:
        loc: mean of log beta, any finite value.
        scale: standard deviation of log beta, > 0, kept through softplus.
        estimator: "monte_carlo", as in the paper: the log of a mean over `samples` fresh draws per pair (Eq. 8), which
            is biased by about -Var / (2 samples mean^2). Or "quadrature": the trapezoid rule, deterministic, with
            error below 1e-10 in log E at the default 64 nodes for scale <= 1 and exp(loc) * |delta_r| <= 5e3; take
            64 * scale nodes above scale 1.
        samples: draws per pair (K in the paper), >= 1. nodes: quadrature nodes, >= 2.
        learnable: False makes the parameters buffers (the paper's fixed-parameters baseline).
        device, dtype: of the parameters, float32 by default.
    """

    raw_loc: Tensor
    raw_scale: Tensor

    def __init__(
        self,
        loc: float = -2.3,
        scale: float = 0.6,
        estimator: str = "monte_carlo",
        samples: int = 16,
        nodes: int = 64,
        *,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not math.isfinite(loc):
            raise ValueError(f"loc must be finite, got {loc}")
        _check_positive("scale", scale)
        if estimator not in ("monte_carlo", "quadrature"):
            raise ValueError(f"estimator must be 'monte_carlo' or 'quadrature', got {estimator!r}")
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples}")
        if nodes < 2:
            raise ValueError(f"nodes must be >= 2, got {nodes}")
        self.estimator, self.samples, self.nodes = estimator, samples, nodes
        _hold(self, "raw_loc", loc, learnable, device, dtype)
        _hold(self, "raw_scale", _softplus_inverse(scale), learnable, device, dtype)

    @property
    def loc(self) -> Tensor:
        """Mean of log beta, a tensor without dimensions."""
        return self.raw_loc.squeeze(0).to(_widest(self.raw_loc))

    @property
    def scale(self) -> Tensor:
        """Standard deviation of log beta, a tensor without dimensions."""
        return _softplus(self.raw_scale)

    @property
    def mean(self) -> Tensor:
        """E[beta] = exp(loc + scale^2 / 2), a tensor without dimensions."""
        return torch.exp(self.loc + self.scale.square() / 2)

    @property
    def variance(self) -> Tensor:
        """Var[beta] = E[beta]^2 (exp(scale^2) - 1), a tensor without dimensions."""
        return (self.mean * self.cv).square()

    @property
    def cv(self) -> Tensor:
        """sd / mean = sqrt(exp(scale^2) - 1), a tensor without dimensions."""
        return torch.sqrt(torch.expm1(self.scale.square()))

    def log_choice_prob(self, delta_r: Tensor, noise: Tensor | None = None) -> Tensor:
        """log E_beta[sigma(beta * delta_r)], in the shape of delta_r.

        noise: standard normal draws, delta_r.shape + (samples,), for the Monte Carlo estimator; drawn when None.
        """
        delta_r, loc, scale = _widen(delta_r, self.loc, self.scale)
        if self.estimator == "quadrature":
            if noise is not None:
                raise ValueError("noise is for estimator='monte_carlo'; this LogNormal has estimator='quadrature'")
            return _log_choice_prob(delta_r, lambda a: lognormal_log_tail_quadrature(a, loc, scale, self.nodes))
        shape = (*delta_r.shape, self.samples)
        if noise is None:
            noise = torch.randn(shape, dtype=delta_r.dtype, device=delta_r.device)
        elif noise.shape != shape:
            raise ValueError(
                f"noise must have the shape delta_r.shape + (samples,) = {shape}, got {tuple(noise.shape)}"
            )
        draws = noise.to(delta_r.dtype)
        return _log_choice_prob(delta_r, lambda a: lognormal_log_tail_monte_carlo(a, loc, scale, draws))

    def posterior_mean(self, delta_r: Tensor) -> Tensor:
        """E[beta | this choice was made], in the shape of delta_r, by quadrature with either estimator.

        beta times the density of LogNormal(loc, scale) is E[beta] times that of LogNormal(loc + scale^2, scale).
        """
        delta_r, loc, scale = _widen(delta_r, self.loc, self.scale)
        before = _log_choice_prob(delta_r, lambda a: lognormal_log_tail_quadrature(a, loc, scale, self.nodes))
        shifted = loc + scale.square()
        after = _log_choice_prob(delta_r, lambda a: lognormal_log_tail_quadrature(a, shifted, scale, self.nodes))
        return _tilted_mean(torch.exp(loc + scale.square() / 2), before, after)

    def extra_repr(self) -> str:
        size = f"samples={self.samples}" if self.estimator == "monte_carlo" else f"nodes={self.nodes}"
        return f"loc={self.loc.item():.6g}, scale={self.scale.item():.6g}, estimator={self.estimator!r}, {size}"


class Gamma(nn.Module):
    """beta ~ Gamma(concentration k, rate), density rate^k beta^(k-1) e^(-rate beta) / Gamma(k) (Sec. 3.3, App. C).

    Args:
        concentration: k > 0, kept through softplus. cv = 1 / sqrt(k): large k is a point mass at k / rate, plain DPO.
        rate: > 0, in nats of delta_r, kept through softplus.
        learnable: False makes the parameters buffers (the paper's fixed-parameters baseline).
        device, dtype: of the parameters, float32 by default.
    """

    raw_concentration: Tensor
    raw_rate: Tensor

    def __init__(
        self,
        concentration: float = 2.0,
        rate: float = 16.7,
        *,
        learnable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive("concentration", concentration)
        _check_positive("rate", rate)
        _hold(self, "raw_concentration", _softplus_inverse(concentration), learnable, device, dtype)
        _hold(self, "raw_rate", _softplus_inverse(rate), learnable, device, dtype)

    @property
    def concentration(self) -> Tensor:
        """Shape parameter k, a tensor without dimensions."""
        return _softplus(self.raw_concentration)

    @property
    def rate(self) -> Tensor:
        """Rate parameter (the paper's lambda), a tensor without dimensions."""
        return _softplus(self.raw_rate)

    @property
    def mean(self) -> Tensor:
        """E[beta] = concentration / rate, a tensor without dimensions."""
        return self.concentration / self.rate

    @property
    def variance(self) -> Tensor:
        """Var[beta] = concentration / rate^2, a tensor without dimensions."""
        return self.concentration / self.rate.square()

    @property
    def cv(self) -> Tensor:
        """sd / mean = concentration^(-1/2), a tensor without dimensions."""
        return self.concentration.rsqrt()

    def log_choice_prob(self, delta_r: Tensor) -> Tensor:
        """log E_beta[sigma(beta * delta_r)] (Eqs. 4, 5), exact to rounding, in the shape of delta_r."""
        delta_r, concentration, rate = _widen(delta_r, self.concentration, self.rate)
        return _log_choice_prob(delta_r, lambda a: gamma_log_tail(a, concentration, rate))

    def posterior_mean(self, delta_r: Tensor) -> Tensor:
        """E[beta | this choice was made], in the shape of delta_r.

        beta times the density of Gamma(k, rate) is E[beta] times that of Gamma(k + 1, rate).
        """
        delta_r, concentration, rate = _widen(delta_r, self.concentration, self.rate)
        before = _log_choice_prob(delta_r, lambda a: gamma_log_tail(a, concentration, rate))
        after = _log_choice_prob(delta_r, lambda a: gamma_log_tail(a, concentration + 1, rate))
        return _tilted_mean(concentration / rate, before, after)

    def extra_repr(self) -> str:
        return f"concentration={self.concentration.item():.6g}, rate={self.rate.item():.6g}"
