"""A row of the table: one claim, what was measured, and the bound it has to meet."""

import math
from dataclasses import dataclass

PASSED, FAILED, ORACLE, REPORTED = "passed", "failed", "oracle", "reported"


@dataclass(frozen=True)
class Row:
    """verdict: passed or failed against the bound; oracle: the references disagree, nothing was judged, a failure too;
    reported: a measurement without a bound (timings, and facts about other people's code)."""

    claim: str
    source: str
    expected: str
    measured: float | str
    bound: float | str
    verdict: str

    @property
    def ok(self) -> bool:
        return self.verdict in (PASSED, REPORTED)


def at_most(claim: str, source: str, expected: str, measured: float, bound: float) -> Row:
    """Passes if measured <= bound. A NaN fails."""
    return Row(claim, source, expected, float(measured), float(bound), PASSED if measured <= bound else FAILED)


def near(claim: str, source: str, expected: float, measured: float, tolerance: float, why: str = "") -> Row:
    """Passes if |measured - expected| <= tolerance; `why` says what the tolerance is made of."""
    ok = math.isfinite(measured) and abs(measured - expected) <= tolerance
    bound = f"± {tolerance:.2g}" + (f" ({why})" if why else "")
    return Row(claim, source, f"{expected:.7g}", float(measured), bound, PASSED if ok else FAILED)


def holds(claim: str, source: str, expected: str, measured: str, passed: bool, bound: str = "as expected") -> Row:
    """For statements that are not one number."""
    return Row(claim, source, expected, measured, bound, PASSED if passed else FAILED)


def reported(claim: str, source: str, expected: str, measured: float | str) -> Row:
    return Row(claim, source, expected, measured, "none", REPORTED)


def oracle_failed(claim: str, source: str, measured: float, bound: float) -> Row:
    return Row(claim, source, "the references agree", float(measured), float(bound), ORACLE)


def number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"
