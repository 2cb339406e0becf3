"""A plugin of pytest: what fails is shown at once, as a run may be cut off."""
from __future__ import annotations

from typing import Any

import pytest


class AtOnce:

    def __init__(self, config: pytest.Config, terminal: Any) -> None:
        self.config = config
        self.terminal = terminal

    def show(self, report: Any) -> None:
        if report.failed:
            self.terminal.write_line(
                f'\n----- {report.nodeid}\n{report.longreprtext}')

    pytest_runtest_logreport = pytest_collectreport = show

    def pytest_sessionfinish(self) -> None:
        self.config.option.tbstyle = 'no'  # not again


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin('terminalreporter')
    if terminal is not None:  # not in the workers of pytest-xdist
        config.pluginmanager.register(AtOnce(config, terminal))
