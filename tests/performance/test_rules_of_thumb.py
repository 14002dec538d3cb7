"""The page of rules of thumb is what the model says today."""

from __future__ import annotations

from pathlib import Path

from servingtiers.performance.rules_of_thumb import main, page

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "rules-of-thumb.md"


def test_the_page_is_in_step_with_the_model() -> None:
    """Regenerate it with python -m servingtiers.performance.rules_of_thumb docs/explanation/rules-of-thumb.md."""
    assert main(["--check", str(PAGE)]) == 0


def test_the_known_answers_come_out() -> None:
    """What is certain: eager loops are not engines, and 200 ms end to end is impossible at any fleet size."""
    text = page()

    assert "wrong for a serving engine" in text
    assert "infeasible at any number of replicas" in text
    assert text.count("\n| ") >= 15


def test_a_stale_page_is_told(tmp_path, capsys) -> None:
    """--check fails and says what to do."""
    stale = tmp_path / "rules.md"
    stale.write_text("old", encoding="utf-8")

    assert main(["--check", str(stale)]) == 1
    assert "make generate" in capsys.readouterr().err
