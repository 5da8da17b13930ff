"""What was learned and what was kept: scorers.py (two scores a row), matrix.py (the accuracy matrix and its metrics), drift.py (leaks and coverage)."""

from .matrix import AccuracyMatrix

__all__ = ["AccuracyMatrix"]
