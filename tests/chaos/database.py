"""Faults of database."""
