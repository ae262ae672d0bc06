"""Runs each rung in a process of its own, and shows its reports in this one as if they had run here.

A rung is a subfolder; Triton's interpreter and compiler cannot share a process, nor can the switch between them be set
after triton's import. Where pytest is asked for one rung only, and triton is not imported yet, it runs in this process
(with --pdb and all); else its files are collected as one item each. The rungs' processes run one after the other beside
the tests of this one, most of which leave a core idle; their reports wait until the session comes to the first item.
"""

from __future__ import annotations

import ast
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from .quick import mark_slow
from .reports import CHANNEL

HERE = Path(__file__).parent
RUNGS = {"interpreter": {"TRITON_INTERPRET": "1"}, "compiled": {"TRITON_INTERPRET": "0"}}  # and their environment


def rung_of(path: Path) -> str | None:
    return next((name for name in RUNGS if path.is_relative_to(HERE / name)), None)


def _in_process(config: pytest.Config, rung: str) -> bool:
    asked = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    if not all(rung_of(path) == rung for path in asked):
        return False
    ready = os.environ.get("TRITON_INTERPRET", "0") == RUNGS[rung]["TRITON_INTERPRET"]
    return ready or ("triton" not in sys.modules and rung == "interpreter")


class RungFile(pytest.File):
    """A test file of a rung that runs elsewhere: one item."""

    def collect(self) -> Iterator[pytest.Item]:
        yield RungItem.from_parent(self, name=rung_of(self.path))


class RungItem(pytest.Item):
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        tree = ast.parse(self.path.read_text())
        self.extra_keyword_matches.update(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))

    def runtest(self) -> None:
        raise AssertionError("runs in another process")

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} in a process of its own"


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    rung = rung_of(module_path)
    if rung is None or _in_process(parent.config, rung):
        return None
    return RungFile.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rungs come last: by then their processes have done most of their work."""
    mark_slow(items)
    items.sort(key=lambda item: isinstance(item, RungItem))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    paths: dict[str, list[Path]] = {}
    for item in session.items:
        if isinstance(item, RungItem):
            paths.setdefault(item.name, []).append(item.path)
    if paths and not session.config.option.collectonly:
        session.config.stash[_RUNGS] = Rungs(session.config, paths)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _RUNGS in session.config.stash:
        session.config.stash[_RUNGS].stop()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not isinstance(item, RungItem):
        return None
    items = [i for i in item.session.items if isinstance(i, RungItem) and i.name == item.name]
    if item is items[0]:
        item.session.testscollected -= len(items)
        _replay_all(item, item.config.stash[_RUNGS].messages[item.name])
    # An item before this one may have left open what the two have in common.
    item.session._setupstate.teardown_exact(nextitem)
    return True


class Rungs:
    """The rungs' processes, one after the other in a thread, and what they have sent so far."""

    def __init__(self, config: pytest.Config, paths: dict[str, list[Path]]) -> None:
        self.messages: dict[str, queue.SimpleQueue] = {name: queue.SimpleQueue() for name in paths}
        self._config, self._paths, self._environment = config, paths, dict(os.environ)  # before any test changes it
        self._child: subprocess.Popen | None = None
        self._stopped, self._starting = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._starting:
            self._stopped = True
            if self._child is not None:
                self._child.terminate()
        self._thread.join()

    def _run(self) -> None:
        for name in self._paths:
            try:
                said = self._run_one(name)
            except Exception as error:  # the session waits for each rung
                said = repr(error)
            self.messages[name].put({"kind": "exit", "said": said})

    def _run_one(self, name: str) -> str:
        receive, send = os.pipe()
        environment = {**self._environment, **RUNGS[name], CHANNEL: str(send)}
        command = _command(self._config, self._paths[name])
        with os.fdopen(receive) as lines, tempfile.TemporaryFile("w+") as output:
            with os.fdopen(send), self._starting:
                if self._stopped:
                    return "it was not started"
                self._child = subprocess.Popen(
                    command, cwd=self._config.rootpath, env=environment, pass_fds=[send], stdout=output, stderr=output
                )
            for line in lines:
                self.messages[name].put(json.loads(line))
            code = self._child.wait()
            output.seek(0)
            return f"it ended with {code}:\n{output.read()}"


_RUNGS = pytest.StashKey[Rungs]()


def _command(config: pytest.Config, paths: list[Path]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", f"{__package__}.reports", "-p", "no:cacheprovider"]
    for flag, value in (("-k", config.option.keyword), ("-m", config.option.markexpr)):
        command += [flag, value] if value else []
    return [*command, f"--rootdir={config.rootpath}", *map(str, paths)]


def _replay_all(item: RungItem, messages: queue.SimpleQueue) -> None:
    """Shows a rung's reports as they come; a process that dies is a failure of its own."""
    session, finished = item.session, False
    while not (session.shouldfail or session.shouldstop):
        message = messages.get()
        if message["kind"] == "exit":
            if not finished:
                _fail(item, f"the rung's process did not finish: {message['said']}")
            return
        finished |= message["kind"] == "end"
        _replay(session, message)


def _replay(session: pytest.Session, message: dict) -> None:
    config = session.config
    if message["kind"] == "end":
        return
    report = config.hook.pytest_report_from_serializable(config=config, data=message["report"])
    if message["kind"] == "collect":
        config.hook.pytest_collectreport(report=report)
        return
    if report.when == "setup":
        session.testscollected += 1
        config.hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
    config.hook.pytest_runtest_logreport(report=report)
    if report.when == "teardown":
        config.hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)


def _fail(item: RungItem, text: str) -> None:
    location = (str(item.path.relative_to(item.config.rootpath)), None, item.name)
    report = pytest.TestReport(item.nodeid, location, {}, "failed", text, "call")
    item.session.testscollected += 1
    item.config.hook.pytest_runtest_logreport(report=report)
