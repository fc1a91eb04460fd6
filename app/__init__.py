"""Luthier's service: the core, the HTTP side and the command line."""
