"""Faults against a whole private service: what is injected, and what must still be true afterwards."""
