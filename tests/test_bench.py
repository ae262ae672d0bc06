"""The bench refuses what it must, goes on where it stopped, counts right, and the documents say what it measured."""

import dataclasses
import math
import shutil
import subprocess

import pytest
import torch

from bench import __main__ as main
from bench import cases, child, gate, heads, mentions, methods, reasons, results, run, stats, table
from bench.cases import Case
from bench.heads import Peers
from bench.results import Row

SMALL = Case(batch=8, classes=300, dim=32, threads=1)
MARGINS = [dataclasses.replace(SMALL, margin=m) for m in cases.MARGINS]
COMMITTED = results.FOLDER / "cpu.csv"


def through_gate(case, name, change=lambda run: None):
    """The reason for a red gate, or ""; `change` may plant an error in the run."""
    inputs = heads.inputs_of(case)
    want = gate.expected(case, inputs, methods.METHODS[name].detached)
    bound = methods.METHODS[name].build(case, inputs, heads.Peers())
    change(bound)
    return gate.verdict(case, gate.errors(bound, want, bound()))[1]


@pytest.mark.parametrize("name", ["fused", "eager"])
@pytest.mark.parametrize("case", MARGINS, ids=lambda case: case.margin)
def test_gate_is_green_for_what_is_right(case, name):
    assert through_gate(case, name) == ""


@pytest.mark.parametrize("mode", cases.MODES)
def test_gate_is_green_in_every_mode(mode):
    assert through_gate(dataclasses.replace(SMALL, mode=mode), "fused") == ""


@pytest.mark.parametrize("flops, all_rows", [(0, 10**9), (1e11, 100)])
def test_gate_is_green_on_the_ways_of_large_cases(monkeypatch, flops, all_rows):
    monkeypatch.setattr(gate, "FLOAT64_FLOPS", flops)
    monkeypatch.setattr(gate, "ALL_ROWS", all_rows)
    monkeypatch.setattr(gate, "CHUNK", 32)
    assert through_gate(SMALL, "fused") == ""


def test_gate_refuses_a_wrong_margin(monkeypatch):
    monkeypatch.setitem(heads.FUSED_MARGINS, "cosface", heads.fm.CosFace(heads.COSFACE_M + 0.002))
    assert "off the reference" in through_gate(dataclasses.replace(SMALL, margin="cosface"), "fused")


@pytest.mark.parametrize("which", ["embeddings", "weight"])
def test_gate_refuses_a_wrong_gradient(which):
    """The loss is right, and one of the gradients is a thousandth too large."""

    def change(bound):
        getattr(bound, which).register_hook(lambda gradient: gradient * 1.001)

    name = {"embeddings": "embeddings' gradient", "weight": "weights' gradient"}[which]
    assert name in through_gate(SMALL, "fused", change)


def test_gate_refuses_nan():
    assert gate.verdict(SMALL, {"loss": 0.0, "weights' gradient": math.nan})[1]


def test_red_gate_prints_no_speed(monkeypatch):
    """As the child meets it: a planted wrong method gets no seconds, the right one does."""
    wrong = dataclasses.replace(methods.METHODS["fused"], build=planted)
    monkeypatch.setitem(methods.METHODS, "eager", wrong)
    events = []
    job = {"methods": ["eager", "fused"], "peers": [None, None], "budget": 0.01}
    child.time_job(SMALL, job, lambda **event: events.append(event))
    status = {event["method"]: event["status"] for event in events if "status" in event}
    assert status == {"eager": "red gate", "fused": "ok"}
    assert {event["method"] for event in events if "seconds" in event} == {"fused"}


def planted(case, inputs, peers):
    right = methods.METHODS["fused"].build(case, inputs, peers)
    return dataclasses.replace(right, loss=lambda: right.loss() * 1.01)


def test_a_child_out_of_memory_is_a_mark():
    """70,000 x 4,096 weights are 1.1 GB; 1 GB is allowed."""
    case = dataclasses.replace(SMALL, classes=70_000, dim=4096)
    bench = run.Bench(heads.Peers(), run.Limits(memory=2**30))
    bench.rates[case.threads, case.dtype, case.device] = 1e9
    (row,) = bench.measure(case, ["fused"])
    assert (row.status, row.note, row.seconds) == ("out of memory", "out of memory at 1 GB", [])


def test_a_child_measures():
    bench = run.Bench(heads.Peers(), run.Limits(memory=0, budget=0.01))
    bench.rates[SMALL.threads, SMALL.dtype, SMALL.device] = 1e9
    fused, missing = bench.measure(SMALL, ["fused", "torch-lce"])
    assert (fused.status, missing.status, missing.note) == ("ok", "skipped", "it has no margin")
    assert fused.error < 1e-5
    assert len(fused.seconds) >= 3
    assert fused.peak is not None


def test_a_child_that_takes_too_long_is_stopped():
    job = {"kind": "floor", "case": SMALL.as_dict(), "methods": [], "peers": [None, None], "memory_limit": 0}
    with pytest.raises(run.Died) as died:
        list(run.child(job | {"budget": 60}, seconds=0.5))
    assert died.value.status == "too slow"


def test_resume_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(self, case, names, progress):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return [Row(case, name, "ok", floor_rate=1e9, seconds=[0.5]) for name in names]

    monkeypatch.setattr(run.Bench, "measure", measure)
    path = tmp_path / "cpu.csv"
    words = ["--threads", "2", "--axis", "dim", "--methods", "fused", "eager", "--output", str(path)]
    with pytest.raises(KeyboardInterrupt):
        main.main(words)
    assert not path.exists()
    first = list(measured)
    measured.clear()
    assert main.main(words) == 0
    assert path.exists()
    assert set(measured).isdisjoint(first)
    assert set(first) | set(measured) == set(cases.axes()["dim"])
    measured.clear()
    main.main(words)
    assert measured == []  # all is there
    assert "cases are in" in capsys.readouterr().out


def test_the_commit_is_that_of_what_is_measured(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("no git on PATH")

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True)

    assert results.commit_of(tmp_path, "csrc") == "unknown"
    git("init", "-q")
    found = []
    for path in ("csrc", "docs", "csrc"):
        with (tmp_path / path).open("a") as file:
            file.write("a line\n")
        git("add", ".")
        git("commit", "-q", "-m", path)
        found.append(results.commit_of(tmp_path, "csrc"))
    assert found[0] == found[1] != found[2]
    (tmp_path / "docs").write_text("")
    assert results.commit_of(tmp_path, "csrc") == found[2]
    (tmp_path / "csrc").write_text("")
    assert results.commit_of(tmp_path, "csrc") == f"{found[2]} with changes"


def test_what_was_measured_otherwise_is_not_continued(tmp_path):
    header = results.machine("cpu", 2)
    rows = [Row(SMALL, "fused", "ok", seconds=[1.0])]
    partial = tmp_path / "cpu.partial.csv"
    results.write(partial, header | {"commit": "another"}, rows)
    with pytest.raises(ValueError, match="another"):
        main.load(partial, header, False, [SMALL])
    assert main.load(partial, header, True, [SMALL]) == []
    results.write(partial, header, rows)
    assert main.load(partial, header, False, [SMALL]) == rows


def test_rows_survive_the_file(tmp_path):
    rows = [
        Row(SMALL, "fused", "ok", error=1e-7, peak=123, floor_rate=2e9, seconds=[0.25, 0.5]),
        Row(SMALL, "eager", "out of memory", "out of memory at 3 GB, or so", floor_rate=2e9),
    ]
    results.write(tmp_path / "a.csv", {"cpu": "x: y"}, rows)
    assert results.read(tmp_path / "a.csv") == ({"cpu": "x: y"}, rows)


# Numbers worked out by hand


def test_percentiles():
    assert stats.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert stats.spread([7.0]) == (7.0, 7.0, 7.0)
    assert stats.percentile([0.0, 10.0], 20) == pytest.approx(2.0)


def test_ratios_are_of_rounds():
    """The rounds say 2, 2, 2; medians alone would too, but not with a disturbed round in one of them."""
    assert stats.paired([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == (2.0, 2.0, 2.0)
    assert stats.paired([1.0, 8.0, 9.0], [1.0, 2.0, 1.0]).median == 4.0
    assert stats.paired([6.0], [2.0, 100.0, 100.0]) == (3.0, 3.0, 3.0)  # who is slow takes part in the first round


def test_growth():
    assert stats.growth([10, 100, 1000], [3.0, 30.0, 300.0]) == pytest.approx(1.0)
    assert stats.growth([1, 4, 16], [5.0, 10.0, 20.0]) == pytest.approx(0.5)


def test_figures_of_a_row():
    case = Case(batch=10, classes=100, dim=1000)
    row = Row(case, "fused", "ok", peak=500_000, floor_rate=8e6, seconds=[1.5, 1.5, 1.5])
    assert case.flops == 8_000_000
    assert row.floor_seconds == 1.0
    assert row.over_floor == 1.5
    assert row.beyond == 100_000  # the gradient has 4 bytes a weight
    eager = Row(case, "eager", "ok", seconds=[3.0, 4.5, 6.0])
    assert results.times_as_fast([row, eager], "fused", "eager").median == 3.0
    assert not table.lost([row, eager], "eager")
    assert table.lost([eager, dataclasses.replace(row, method="fused", seconds=[9.0] * 3)], "eager")


def test_repeats_follow_the_budget():
    from bench.timing import repeats

    assert [repeats(one, 3.0) for one in (0.001, 0.25, 0.5, 2.9, 3.1)] == [9, 6, 3, 3, 1]
    assert repeats(23.0, 3.0, baseline=True) == 3


# What the documents say


def test_what_was_skipped_is_measured_where_the_reason_is_gone():
    case, asked = Case(), ["fused", "insightface"]
    skipped = Row(case, "insightface", "skipped", "no partial_fc_v2.py in no-such-folder")
    rows = [Row(case, "fused", "ok"), skipped]
    assert main.missing(rows, [case], asked, Peers()) == {case: asked}
    skipped.note = methods.METHODS["insightface"].why_not(case, Peers())
    assert main.missing(rows, [case], asked, Peers()) == {}


@pytest.mark.parametrize(
    "words, what",
    [
        ("--threads 0", "--threads: got 0; expected more than 0"),
        ("--threads two", "invalid int value: 'two'"),
        ("--budget -1", "--budget: got -1; expected more than 0"),
        ("--memory-limit 0", "--memory-limit: got 0; expected more than 0"),
        ("--smoke --axis classes", "expected one of the two"),
        ("--insightface {folder}/no", "--insightface: no partial_fc_v2.py in {folder}/no"),
        ("--cut-cross-entropy {folder}", "{folder}: there is no folder cut_cross_entropy"),
        ("--output {folder}", "{folder} is a folder"),
        ("--output {folder}/file/a.csv", "{folder}/file"),
        ("--output {folder}/file.csv", "is no table of this bench: it has no column batch, classes"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path, monkeypatch, capsys, words, what):
    monkeypatch.setattr(run.Bench, "measure", lambda *_: pytest.fail("something was measured"))
    (tmp_path / "file").write_text("")
    (tmp_path / "file.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as end:
        main.main(words.format(folder=tmp_path).split())
    assert end.value.code == 2
    assert what.format(folder=tmp_path) in capsys.readouterr().err


def test_a_limit_of_memory_below_what_it_takes_to_start(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--memory-limit", "0.001", "--only", "128x1000x512", "--output", str(tmp_path / "a.csv")])
    assert end.value.code == 2
    assert "while the rate of products was measured" in capsys.readouterr().err


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_tables_are_those_of_the_results(document):
    text = (results.ROOT / document).read_text()
    assert table.SECTION.search(text)
    again = table.filled(text, *results.read(COMMITTED))
    assert again == text, f"python -m bench.table --write {document}"


@pytest.mark.parametrize("kind", ["amx", "avx2"])
def test_tables_of_other_processors_are_those_of_their_results(kind):
    text = (results.ROOT / "docs/performance.md").read_text()
    own = results.read(results.FOLDER / f"cpu-{kind}.csv")
    assert table.filled(text, *own, kind) == text, f"python -m bench.table bench/results/cpu-{kind}.csv --kind {kind}"


def test_every_lost_row_has_its_reason():
    assert reasons.UNKNOWN not in table.summary(results.read(COMMITTED)[1])


def test_what_is_named_exists():
    assert mentions.wrong_mentions() == []


@pytest.mark.parametrize(
    "text",
    [
        "run `python -m bench --methods fused no-such`",
        "python -m bench.head --smoke",
        "python -m bench --axis nothing --fresh",
        "python -m bench --only 7x7x7",
        "| method | what |\n|---|---|\n| `fused` | ours |\n| `cut-crossentropy` | gone |",
        "<!-- bench:summary -->\n| case | `eagre` |\n|---|---|\n<!-- /bench:summary -->",
        "<!-- amx:summary -->\n| case | `eagre` |\n|---|---|\n<!-- /amx:summary -->",
        "python -m bench --methods=eagre",
    ],
)
def test_what_is_named_and_does_not_exist_is_found(tmp_path, text):
    (tmp_path / "README.md").write_text(f"# x\n\n{text}\n")
    assert len(mentions.wrong_mentions(tmp_path)) == 1


def test_smoke_fails_where_a_method_is_named_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setattr(main, "wrong_mentions", lambda: ["README.md: methods eagre do not exist"])
    with pytest.raises(SystemExit) as end:
        main.main(["--smoke"])
    assert end.value.code == 2
    assert "eagre" in capsys.readouterr().err


def test_documented_methods_are_all():
    text = (results.ROOT / "docs/performance.md").read_text()
    assert set(mentions._table_names(text)) == set(methods.METHODS)


def test_smoke_reaches_every_margin_dtype_and_mode():
    small = cases.smoke()
    for name, values in (("margin", cases.MARGINS), ("dtype", cases.DTYPES), ("mode", cases.MODES)):
        assert {getattr(case, name) for case in small} == set(values)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from bench import plot

    sizes = cases.axes()["classes"]
    rows = [
        Row(case, "fused", "ok", peak=case.weight_bytes, floor_rate=1e11, seconds=[case.classes / 1e6])
        for case in sizes
    ]
    rows.append(Row(sizes[-1], "eager", "out of memory", "out of memory at 9 GB"))
    rows.append(Row(sizes[0], "eager", "ok", peak=10**8, seconds=[0.1]))
    fits = plot.draw(
        {"cpu": "a CPU", "device": "cpu", "commit": "0123456789ab", "torch": torch.__version__},
        rows,
        tmp_path / "a.png",
    )
    assert fits["fused"] == pytest.approx(1.0)
    assert (tmp_path / "a.png").stat().st_size > 10_000
