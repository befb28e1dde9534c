"""Comparisons: both engines on one batch (parity.py), the native engine with itself (self_check.py), finished runs (runs.py)."""
