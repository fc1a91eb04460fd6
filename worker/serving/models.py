"""The models of one engine: the base, and whole tuned models (`full`) that are loaded when asked for.

Whole models are read by a side thread, so that running answers do not wait for the disk; a few stay, the
one unused for longest leaves first. Knows folders and memory, nothing of requests' words.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from worker.base_model import load_base_model
from worker.serving.adapters import ModelUnavailable
from worker.serving.batch import ModelGroup

GroupLoader = Callable[[str], ModelGroup]
_log = logging.getLogger(__name__)
