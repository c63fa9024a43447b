"""The table that the GPU tests fill, printed at the end of the run."""

import pytest

ROWS: list[tuple[str, object]] = []


@pytest.fixture(scope="session")
def table():
    return ROWS


def pytest_terminal_summary(terminalreporter):
    for name, value in ROWS:
        terminalreporter.write_line(f"{name:<64} {value}")
