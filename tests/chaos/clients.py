"""Faults of clients."""
