"""The child's half of conftest.py: a pytest plugin that sends each report as a line of JSON to a file descriptor."""

import json
import os

import pytest

CHANNEL = "FUSED_MARGIN_REPORTS"  # the descriptor's number, in the environment


class Sender:
    def __init__(self, config: pytest.Config, descriptor: int) -> None:
        self.config, self.file = config, os.fdopen(descriptor, "w", buffering=1)

    def _send(self, kind: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps({"kind": kind, "report": data}), file=self.file)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send("test", report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._send("collect", report)

    def pytest_sessionfinish(self) -> None:
        print(json.dumps({"kind": "end"}), file=self.file)


def pytest_configure(config: pytest.Config) -> None:
    if CHANNEL in os.environ:
        config.pluginmanager.register(Sender(config, int(os.environ.pop(CHANNEL))))
