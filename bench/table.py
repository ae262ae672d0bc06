"""Tables from the CSV of results: `python -m bench.table [CSV] [--write FILE...]`.

In a FILE, what stands between `<!-- bench:summary -->` and `<!-- /bench:summary -->` is replaced by a row a case, what
stands between `<!-- bench:rows -->` and `<!-- /bench:rows -->` by a row for each case and method.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import results
from .cases import MODE_WORDS, Case, axes, axes_of
from .reasons import UNKNOWN, reason
from .results import Row, by_case, times_as_fast
from .stats import Spread


def section(kind: str) -> re.Pattern[str]:
    """What stands between `<!-- KIND:NAME -->` and `<!-- /KIND:NAME -->`."""
    return re.compile(rf"<!-- {kind}:(\w+) -->\n(.*?)<!-- /{kind}:\1 -->", re.DOTALL)


SECTION = section("bench")
PEERS = ("eager", "torch-compile", "pytorch-metric-learning", "insightface")
AXIS_TITLES = {
    "classes": "classes", "batch": "batch", "dim": "dimension", "dtype": "bfloat16 operands (autocast)",
    "margin": "margin", "mode": "mode", "threads": "threads", "small": "small heads",
}  # fmt: skip
MARKS = {"out of memory": "memory", "red gate": "wrong", "too slow": "too slow", "failed": "failed", "skipped": "-"}


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.9995 else f"{value * 1e3:.3g} ms"


def size(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**30:.1f} GB" if value >= 2**30 else f"{value / 2**20:.0f} MB"


def ratio(value: Spread) -> str:
    digits = 2 if value.median < 2 else 1
    return f"{value.median:.{digits}f}x"


def interval(value: Spread) -> str:
    digits = 2 if value.median < 2 else 1
    return f"{value.median:.{digits}f}x ({value.p20:.{digits}f}-{value.p80:.{digits}f})"


def shape(case: Case) -> str:
    return f"{case.batch} x {case.classes:,} x {case.dim}"


def title(case: Case) -> str:
    """What is special about a case."""
    words = [shape(case)]
    centre = Case(threads=case.threads, device=case.device)
    words += [word for word, usual in ((case.margin, centre.margin), (case.dtype, centre.dtype)) if word != usual]
    if case.mode != centre.mode:
        words.append(MODE_WORDS[case.mode])
    if case.device == "cpu" and case.threads != 2:
        words.append("1 thread" if case.threads == 1 else f"{case.threads} threads")
    return ", ".join(words)


def lost(rows: list[Row], method: str) -> bool:
    """Slower than `method`, and not by noise alone: the whole interval lies below 1."""
    fused_is = times_as_fast(rows, "fused", method)
    return fused_is is not None and fused_is.p80 < 1


class Notes:
    """Reasons, numbered as they come up."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def lines(self) -> Iterator[str]:
        yield from (f"[{number}] {text[0].upper()}{text[1:]}." for number, text in enumerate(self.texts, 1))


def _cell(rows: list[Row], method: str, notes: Notes) -> str:
    """How many times as fast the fused head is, or why that is not known."""
    row = next((row for row in rows if row.method == method), None)
    if row is None:
        return ""
    if row.status != "ok":
        return f"{MARKS[row.status]}{notes.mark(row.note)}" if row.status == "skipped" else _marked(row, notes)
    fused_is = times_as_fast(rows, "fused", method)
    if fused_is is None:
        return seconds(row.time.median)
    few = notes.mark("one repeat only, as it is slow") if len(row.seconds) == 1 else ""
    why = notes.mark(reason(row.case, method)) if lost(rows, method) else ""
    return ratio(fused_is) + few + why


def _marked(row: Row, notes: Notes) -> str:
    if row.status == "out of memory":
        return row.note
    return MARKS[row.status] + notes.mark(f"{row.method}: {row.note}")


def _case_line(rows: list[Row], notes: Notes) -> str:
    case, found = rows[0].case, {row.method: row for row in rows}
    fused, eager = found.get("fused"), found.get("eager")
    cells = [title(case)]
    if fused is not None and fused.status == "ok":
        cells += [seconds(fused.time.median), "" if fused.over_floor is None else f"{fused.over_floor:.2f}x"]
    else:
        cells += ["" if fused is None else _marked(fused, notes), ""]
    cells += [_cell(rows, method, notes) for method in PEERS]
    cells += [size(row.beyond) if row is not None else "" for row in (fused, eager)]
    return f"| {' | '.join(cells)} |"


def _grouped(rows: list[Row]) -> Iterator[tuple[str, list[list[Row]]]]:
    """Cases under the title of the first axis on which they lie and which is theirs: the centre goes with classes."""
    cases = by_case(rows)
    first = next(iter(cases))
    table = axes(max(case.threads for case in cases), first.device)
    groups: dict[str, list[list[Row]]] = {}
    for case, of_case in cases.items():
        names = axes_of(case, table) or ["other"]
        groups.setdefault(AXIS_TITLES.get(names[0], "other"), []).append(of_case)
    for name, group in groups.items():
        yield name, sorted(group, key=lambda of_case: (of_case[0].case.batch, of_case[0].case.classes))


def case_table(rows: list[Row], notes: Notes) -> list[str]:
    head = ["batch x classes x dimension", "`fused`", "floor", *(f"`{name}`" for name in PEERS)]
    head += ["memory `fused`", "memory `eager`"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, cases in _grouped(rows):
        lines.append(f"| *{name}* |{' |' * (len(head) - 1)}")
        lines += [_case_line(of_case, notes) for of_case in cases]
    return lines


def normface_table(rows: list[Row], notes: Notes) -> list[str]:
    """The one case in which fused linear and cross-entropy compute the same."""
    cases = [of_case for case, of_case in by_case(rows).items() if case.margin == "normface"]
    lines = []
    for of_case in cases:
        lines += ["", f"NormFace (no margin), {shape(of_case[0].case)}, beside fused linear and cross-entropy:", ""]
        lines += ["| method | median | `fused` is | memory |", "|---|---|---|---|"]
        for row in of_case:
            if row.status == "skipped":
                continue
            time = seconds(row.time.median) if row.seconds else row.status
            against = "" if row.method == "fused" else _cell(of_case, row.method, notes)
            lines.append(f"| `{row.method}` | {time} | {against} | {size(row.beyond)} |")
    return lines


def where(header: dict[str, str]) -> str:
    packages = ("pytorch-metric-learning", "cut-cross-entropy", "insightface")
    versions = [f"{name} {header[name]}" for name in ("torch", *packages) if header.get(name, "not i")[:5] != "not i"]
    gpu = "" if header["device"] == "cpu" else f"{header['device']}, "
    return (
        f"{gpu}{header['cpu']}, {header['machine'].split(', ', 1)[1]}, {header['threads'].split()[0]} threads "
        f"({header['cpu path']}); {', '.join(versions)}; commit {header['commit']}, {header['date'].split()[0]}."
    )


def summary(rows: list[Row], header: dict[str, str] | None = None) -> str:
    """A row a case, and the reasons below."""
    if not rows:
        return "no rows"
    notes = Notes()
    lines = [where(header), ""] if header else []
    lines += case_table(rows, notes) + normface_table(rows, notes)
    return "\n".join([*lines, *(("", *notes.lines()) if notes.texts else ())]).rstrip()


def every_row(rows: list[Row]) -> str:
    """A row for each case and method, with all intervals."""
    head = ["case", "method", "median (p20-p80)", "`fused` is", "`eager` / this", "floor", "memory", "note"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for of_case in by_case(rows).values():
        for row in of_case:
            lines.append(f"| {' | '.join([title(row.case), f'`{row.method}`', *_every_cell(of_case, row)])} |")
    return "\n".join(lines)


def _every_cell(of_case: list[Row], row: Row) -> list[str]:
    note = row.note
    if lost(of_case, row.method):
        note = "; ".join(filter(None, [note, reason(row.case, row.method)]))
    if not row.seconds:
        return [row.status, "", "", "", size(row.beyond), "" if note == row.status else note]
    fused_is = times_as_fast(of_case, "fused", row.method)
    vs_eager = times_as_fast(of_case, row.method, "eager")
    return [
        f"{seconds(row.time.median)} ({seconds(row.time.p20)}-{seconds(row.time.p80)})",
        interval(fused_is) if fused_is and row.method != "fused" else "",
        interval(vs_eager) if vs_eager and row.method != "eager" else "",
        "" if row.over_floor is None else f"{row.over_floor:.2f}x",
        size(row.beyond),
        note,
    ]


def fill_sections(text: str, kind: str, makers: dict[str, Callable[[], str]]) -> str:
    """The text with the sections of this kind made anew."""

    def fill(match: re.Match[str]) -> str:
        if match[1] not in makers:
            raise ValueError(f"section {kind}:{match[1]} is unknown; expected one of {', '.join(makers)}")
        return f"<!-- {kind}:{match[1]} -->\n{makers[match[1]]()}\n<!-- /{kind}:{match[1]} -->"

    if not section(kind).search(text):
        name = next(iter(makers))
        raise ValueError(f"no section to write; expected <!-- {kind}:{name} --> and <!-- /{kind}:{name} -->")
    return section(kind).sub(fill, text)


def write_sections(path: Path, kind: str, makers: dict[str, Callable[[], str]]) -> None:
    path.write_text(fill_sections(path.read_text(), kind, makers))


def filled(text: str, header: dict[str, str], rows: list[Row], kind: str = "bench") -> str:
    """The text with its sections of this kind made anew."""
    return fill_sections(text, kind, {"summary": lambda: summary(rows, header), "rows": lambda: every_row(rows)})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.split("\n")[0])
    parser.add_argument("csv", nargs="?", type=Path, default=results.FOLDER / "cpu.csv")
    parser.add_argument("--write", nargs="+", type=Path, metavar="FILE", default=[], help="replace the sections there")
    parser.add_argument("--kind", default="bench", help="sections of another name, for another CSV (%(default)s)")
    args = parser.parse_args(argv)
    if not args.csv.exists():
        parser.error(f"{args.csv} is not there; expected the results of `python -m bench`")
    try:
        header, rows = results.read(args.csv)
    except ValueError as error:
        parser.error(str(error))
    if not args.write:
        print(summary(rows, header))
    for path in args.write:
        try:
            path.write_text(filled(path.read_text(), header, rows, args.kind))
        except ValueError as error:
            parser.error(f"{path}: {error}")
    if UNKNOWN in summary(rows):
        print(f"a row is lost without a reason: give one in {results.FOLDER.parent / 'reasons.py'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
