"""Numerical verification of mixdpo.py and of the paper's claims: `python -m verify [names] [--full]`.

One small file per check, each with `check(full) -> list[Row]` and, where a picture says more, `figures(full)`.
"""
