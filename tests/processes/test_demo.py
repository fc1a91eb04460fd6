"""What the demo leaves its user with: lines that a shell takes as they are."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from app.cli.demo import lines_to_go_on
from app.cli.demo_score import Row, score
from app.core.settings import Settings

SYSTEM = "You're the shop's \"clerk\"; $HOME costs 5 €.\nAnswer in JSON."


def lines(settings: Settings) -> list[list[str]]:
    told = lines_to_go_on(settings, key="sk-$1", model="ft:m:luthier:shop:1", system=SYSTEM)
    return [shlex.split(line) for line in told]


def test_the_lines_survive_every_sign_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/luthier", "demo"])
    up, curl = lines(Settings(data_dir=Path("a folder"), port=8123))
    assert up == [".venv/bin/luthier", "up", "--data-dir", "a folder"]
    assert curl[:2] == ["curl", "http://127.0.0.1:8123/v1/chat/completions"]
    assert "Authorization: Bearer sk-$1" in curl
    body = json.loads(curl[curl.index("-d") + 1])
    assert body["model"] == "ft:m:luthier:shop:1"
    assert body["messages"][0] == {"role": "system", "content": SYSTEM}


def test_the_command_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv/bin/luthier"), "demo"])
    assert lines(Settings())[0][0] == ".venv/bin/luthier"
    monkeypatch.setattr(sys, "argv", ["/srv/luthier/bin/luthier", "demo"])
    assert lines(Settings())[0][0] == "/srv/luthier/bin/luthier"
    monkeypatch.setattr(sys, "argv", ["/src/app/cli/main.py", "demo"])
    assert lines(Settings())[0][:3] == [sys.executable, "-m", "app.cli.main"]


def test_any_free_port_becomes_one_that_both_lines_name() -> None:
    up, curl = lines(Settings(port=0))
    assert up[-2:] == ["--port", "8000"]
    assert curl[1].startswith("http://127.0.0.1:8000/")


def test_only_answers_in_the_right_form_count() -> None:
    right = {"intent": "refund", "urgency": "high", "product": "bell", "reply": "Sorry."}
    row = Row("s", "m", right)
    swapped = json.dumps({"urgency": "high", "intent": "refund", "product": "bell", "reply": ""})
    answers = [json.dumps(right), swapped, "[1]", "no JSON"]
    found = score([row] * 4, answers)
    assert (found.valid_json, found.right_keys, found.right_intent) == (2, 1, 1)
    assert found.beats(score([row] * 4, ["no"] * 4))
    assert not found.beats(found)
