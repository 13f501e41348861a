"""Counts the faults that were tried, by kind: `make test-faults`."""

from __future__ import annotations

from collections import Counter

import pytest

KINDS: Counter[tuple[str, str]] = Counter()


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    marker = item.get_closest_marker("faults")
    if marker is None:
        return
    if call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception):
        KINDS[marker.args[0], "skipped"] += 1
    elif call.excinfo is not None:
        KINDS[marker.args[0], "failed"] += 1
    elif call.when == "call":
        KINDS[marker.args[0], "passed"] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not KINDS or "faults" not in str(terminalreporter.config.option.markexpr):
        return
    kinds = sorted({kind for kind, _ in KINDS})
    terminalreporter.section("faults by kind")
    for kind in kinds:
        counts = [
            f"{KINDS[kind, state]} {state}"
            for state in ("passed", "failed", "skipped")
            if KINDS[kind, state]
        ]
        terminalreporter.write_line(f"{kind:<56}{', '.join(counts)}")
    whole: Counter[str] = Counter(dict.fromkeys(("passed", "failed", "skipped"), 0))
    for (_, state), count in KINDS.items():
        whole[state] += count
    terminalreporter.write_line(
        f"{'all':<56}{', '.join(f'{n} {state}' for state, n in whole.items())}"
    )
