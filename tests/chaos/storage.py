"""Faults of storage."""
