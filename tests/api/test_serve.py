"""The API as a process: its memory, what it imports, how it ends."""

from __future__ import annotations

import signal
import time

import httpx
import psutil
import pytest

from app.core.completions import Delta
from app.core.settings import Settings
from tests.api.conftest import Tenant
from tests.api.processes import api_process
from tests.api.workers import InferenceWorker


def test_the_process_is_small_without_torch_and_ends_with_zero(settings: Settings) -> None:
    with api_process(settings) as (process, url):
        for _ in range(50):
            assert httpx.get(f"{url}/healthz").status_code == 200
        assert psutil.Process(process.pid).memory_info().rss < 200 * 2**20
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=15)
        assert (process.returncode, output) == (0, "left in order False\n")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_open_stream_holds_the_end_up_for_a_few_seconds_only(
    tenant: Tenant, settings: Settings, worker: InferenceWorker, stop: signal.Signals
) -> None:
    worker.script = lambda _request: [[Delta(index=0, text="so far")]]
    body = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with (
        api_process(settings) as (process, url),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=tenant.http.headers) as answer,
    ):
        assert answer.status_code == 200
        process.send_signal(stop)
        started = time.monotonic()
        process.communicate(timeout=20)
        assert process.returncode == 0
        assert time.monotonic() - started < 12
