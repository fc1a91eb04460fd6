"""What tests say about answers."""

from __future__ import annotations

from typing import Any

import httpx

from app.core.storage import Storage


def assert_refused(
    response: httpx.Response, status: int, *, code: str | None, param: str | None = None, says: str = ""
) -> None:
    """The envelope with all its keys, this status, code and param, and a sentence that helps."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body: dict[str, Any] = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    assert says in body["error"]["message"], body
    assert len(body["error"]["message"]) > 15


def stored(storage: Storage) -> list[str]:
    """Everything that lies in storage, half-written files too."""
    return sorted(f"{path.parent.name}/{path.name}" for path in storage.root.glob("*/*"))
