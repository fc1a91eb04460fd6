"""Sentences for failures that other layers raise in their own words. Imported only when something failed."""

from __future__ import annotations

import sys

_EXTRAS = {
    "fastapi": "api",
    "uvicorn": "api",
    "python_multipart": "api",
    "torch": "worker",
    "transformers": "worker",
    "peft": "worker",
    "bitsandbytes": "worker",
    "safetensors": "worker",
    "tokenizers": "worker",
    "gguf": "worker",
    "huggingface_hub": "worker",
    "openai": "embedded",
}


def explain(error: Exception) -> str | None:
    """One sentence with the cure, or None for a failure nobody expected."""
    if isinstance(error, ModuleNotFoundError):
        return _missing_extra(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; correct that and start again."
    return _from_core(error)


def _missing_extra(error: ModuleNotFoundError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    extra = _EXTRAS[package]
    return f"{package} is not installed; run `make setup`, or `pip install '.[{extra}]'` in the clone."


def _from_core(error: Exception) -> str | None:
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from app.core.base_models import CatalogueError
    from app.core.errors import ServiceError

    if isinstance(error, CatalogueError | ServiceError):
        return str(error)
    weights = sys.modules.get("worker.weights.words")
    if weights is not None and isinstance(error, weights.WeightsError):
        return str(error)
    if isinstance(error, OperationalError):
        reason = str(error.orig).strip().splitlines()[0]
        return f"The database cannot be used: {reason} - start it, or correct LUTHIER_DATABASE_URL."
    if isinstance(error, ProgrammingError) and "does not exist" in str(error.orig):
        return "The database has no schema yet, or an older one; run luthier migrate."
    return None
