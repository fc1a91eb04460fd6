"""Ids as a client sees them: a prefix that tells the kind, then random letters and digits."""

from __future__ import annotations

import secrets
import string
from enum import StrEnum

_ALPHABET = string.ascii_letters + string.digits


class Prefix(StrEnum):
    """The kinds of ids, with OpenAI's own prefixes."""

    FILE = "file-"
    JOB = "ftjob-"
    EVENT = "ftevent-"
    CHECKPOINT = "ftckpt_"
    COMPLETION = "chatcmpl-"
    CALL = "call_"
    RESPONSE = "resp_"
    MESSAGE = "msg_"
    FUNCTION_CALL = "fc_"
    FUNCTION_CALL_OUTPUT = "fco_"
    TEXT_COMPLETION = "cmpl-"
    REQUEST = "req_"
    KEY = "key_"
    PROJECT = "proj_"
    ORGANIZATION = "org-"


def new_id(prefix: Prefix) -> str:
    """A fresh id: 24 characters of 62, about 143 random bits."""
    return prefix + random_name(24)


def random_name(length: int) -> str:
    """Random letters and digits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
