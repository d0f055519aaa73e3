"""How far a long step is, on a terminal and in a log."""

import io
import time

import pytest

from medxray import progress
from medxray.progress import progress_bar, quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_with_rate_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    for _ in progress_bar(range(3), desc="step", unit="study", mininterval=0):
        time.sleep(0.01)
    drawn = terminal.getvalue().split("\r")
    assert len(drawn) > 3 and drawn[-1].startswith("step: 100%") and "<" in drawn[-1] and "study/s" in drawn[-1]


@pytest.mark.parametrize(("line_s", "lines"), [(0.05, 3), (30.0, 0)])
def test_a_log_has_a_line_now_and_then(line_s: float, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr(progress, "LINE_S", line_s)
    for _ in progress_bar(range(30), desc="step", unit="study"):
        time.sleep(0.01)
    found = log.getvalue().splitlines()
    assert min(lines, 2) <= len(found) <= 4 * lines, "fewer than the 30 steps"
    assert all(line.startswith("step: ") and "\r" not in line for line in found)


def test_quiet_reaches_what_lies_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with quiet(), quiet(False):
        list(progress_bar(range(3)))
    list(progress_bar(range(3), disable=True))
    monkeypatch.setenv("RANK", "1")
    list(progress_bar(range(3)))
    assert not terminal.getvalue(), "asked for, or another process of one fit"
    monkeypatch.delenv("RANK")
    list(progress_bar(range(3)))
    assert terminal.getvalue()
