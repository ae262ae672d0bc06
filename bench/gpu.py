"""On a machine with a GPU: are the GPU backends right there, and how fast? `make gpu`, or `python -m bench.gpu`.

Parity first: every margin in every mode, and the sweep with its options in several chunks, against the float64 oracle
of the tests, under their error rule, and the optimizers' steps against torch.optim on the dense gradient. Then medians
of fused and plain PyTorch, GB/s and operations/s beside the copy and product rates measured in the same run, and peak
memory: CSV and picture, with the device's name; last, training steps with their optimizer. `--rehearse`: all of it,
tiny, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from head_cost import SCALE

import fused_margin as fm
from fused_margin.kernels.configs import interpreted
from tests import cases as problems
from tests.gpu_without_gpu.sweep_cases import Sweep

from . import gate, optim
from .cases import Case
from .cost import totals_elsewhere
from .heads import FUSED_MARGINS, Inputs, Peers, Run, inputs_of
from .methods import METHODS
from .results import FOLDER
from .stats import spread
from .timing import inner_loops, timed

SHAPES = [(128, 10**5, 512), (512, 10**5, 512), (512, 10**6, 512), (1024, 10**6, 512), (4096, 10**6, 512)]
REHEARSAL = [(16, 96, 32)]
PARITY = [(67, 1000, 128), (40, 777, 500), (300, 5000, 512)]  # tails; more than one tile of rows
CHUNKED = [("plain", 2100, 9000, 64), ("index, 2 centers", 40, 16000, 200)]
STEPS = [(512, 10**5, 512), (512, 10**6, 512)]
STEP_TOLERANCE = {None: 1e-4, torch.bfloat16: 1e-2}  # a weight that differs by an ulp may round to another operand
ROUNDS = 20


@dataclass
class Row:
    """A line of the CSV."""

    batch: int
    classes: int
    dim: int
    dtype: str
    method: str
    status: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gb_per_s: float | None = None
    of_copy: float | None = None
    tflop_per_s: float | None = None
    of_product: float | None = None
    peak_mb: float | None = None


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter on a CPU: a rehearsal, no result"


def arch_of(device: str) -> int | str:
    if device != "cuda":
        return 80
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def asked_for(rehearse: bool) -> dict[str, str]:
    """GPU backends by the names of their rows; Triton alone where there is no GPU, or an AMD one."""
    return {"fused": "triton"} if rehearse or torch.version.hip else {"fused": "triton", "fused-cuda": "cuda"}


def backends(rehearse: bool) -> dict[str, str]:
    """Those that run here."""
    return {method: name for method, name in asked_for(rehearse).items() if not fm.why_not(name)}


def parity(device: str, rehearse: bool) -> Iterator[tuple[str, list[str]]]:
    """(what, broken limits) for each backend, margin and mode, over all shapes."""
    shapes = [(20, 70, 32)] if rehearse else PARITY
    margins = ["arcface_linear", "sv_cosface"] if rehearse else list(problems.MARGINS)
    modes = ["fp32", "bf16"] if rehearse else [name for name in problems.MODES if name != "fp64"]
    for backend, margin, mode in itertools.product(backends(rehearse).values(), margins, modes):
        rule = problems.ErrorRule()
        for seed, shape in enumerate(shapes):
            p = problems.problem(problems.MARGINS[margin], problems.MODES[mode], *shape, seed)
            there = replace(
                p,
                labels=p.labels.to(device),
                upstream=p.upstream.to(device),
                tensors={name: t.to(device) for name, t in p.tensors.items()},
            )
            got = {name: t.cpu() for name, t in problems.run(there, backend).items()}
            rule.add_all(got, problems.plain(p), problems.exact(p))
        yield f"{backend}, {margin}, {mode}", rule.failures()


def swept_parity(device: str, rehearse: bool) -> Iterator[tuple[str, list[str]]]:
    """The same for the sweep itself in several chunks: an index, sub-centres, offsets, label smoothing's sum.

    Triton's chunks are as small as they may be; of the CUDA backend the first size has several.
    """
    sizes = [("index, 2 centers", 16, 7400, 16)] if rehearse else CHUNKED
    operands = (torch.bfloat16,) if rehearse else (torch.float32, torch.bfloat16, torch.float16)
    for backend, size, dtype in itertools.product(backends(rehearse).values(), sizes, operands):
        layout, batch, classes, dim = size
        rule = problems.ErrorRule()
        sweep = Sweep("identity", dtype, layout, dim=dim, backend=backend, batch=batch, classes=classes)
        with small_chunks(device) if backend == "triton" else contextlib.nullcontext():
            sweep.check(rule=rule, device=device)
        yield f"{backend}, {batch} x {classes} x {dim}, {layout}, products in {dtype}", rule.failures()


def small_chunks(device: str) -> contextlib.AbstractContextManager:
    from fused_margin.kernels import configs

    return configs.use(configs.device_for(torch.empty(0, device=device))._replace(chunk_bytes=1))


def step_parity(device: str, rehearse: bool) -> Iterator[tuple[str, list[str]]]:
    """The same for SweepSGD, SweepAdamW and RowSGD beside torch's operators, after three steps.

    On a GPU with more classes than a chunk has.
    """
    classes = 300 if rehearse else 300_000
    for backend, kind, dtype in itertools.product(backends(rehearse).values(), optim.PAIRS, (None, torch.bfloat16)):
        at, limit = optim.Where(device, backend, dtype), STEP_TOLERANCE[dtype]
        error = optim.parity(kind, torch.float32, at, classes)
        wrong = [] if error <= limit else [f"error {error:.1e} exceeds {limit:.0e}"]
        yield f"{backend}, {optim.PAIRS[kind][0]}, products in {dtype or torch.float32}", wrong


def rates(device: str, rehearse: bool) -> tuple[float, dict[str, float]]:
    """Bytes per second of a copy, and operations per second of a product by dtype, the best of ten each."""
    side, size = (64, 2**16) if rehearse else (8192, 2**30)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    best = min(timed(partial(target.copy_, source), device) for _ in range(10))
    products = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(side, side, device=device, dtype=dtype)  # a GPU multiplies ones at a higher clock
        out = torch.empty_like(a)
        products[name] = 2.0 * side**3 / min(timed(partial(torch.mm, a, a, out=out), device) for _ in range(10))
    return 2 * size / best, products


def fused(backend: str, case: Case, inputs: Inputs) -> Run:
    head = partial(fm.functional.margin_cross_entropy, margin=FUSED_MARGINS[case.margin], scale=SCALE, backend=backend)
    return Run(case, lambda: head(*inputs), inputs.embeddings, inputs.weight)


def _peak(work: Callable[[], object], device: str) -> float | None:
    """MB that a step allocates beyond what is there before."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Case, arch: int | str, copy: float, product: float, rehearse: bool) -> Iterator[Row]:
    """A row for each method; a method whose gradients are wrong gets no time."""
    key = case.batch, case.classes, case.dim, case.dtype
    inputs = inputs_of(case)
    want = gate.expected(case, inputs)
    others = () if rehearse else ("eager", "torch-compile")
    builders = {method: partial(fused, backend) for method, backend in backends(rehearse).items()}
    builders |= {name: partial(METHODS[name].build, peers=Peers()) for name in others}
    for name, build in builders.items():
        try:
            run = build(case, inputs)
            loss = run()
            wrong = [
                what for what, error in gate.errors(run, want, loss).items() if not error <= gate.TOLERANCE[case.dtype]
            ]
            if wrong:
                yield Row(*key, name, f"red gate: {', '.join(wrong)}")
                continue
            run.clear()
            peak = _peak(run, case.device)
            inner = 1 if rehearse else inner_loops(timed(run, case.device, before=run.clear))
            rounds = 2 if rehearse else ROUNDS
            times = spread([timed(run, case.device, inner, before=run.clear) for _ in range(rounds)])
        except torch.OutOfMemoryError:
            yield Row(*key, name, "out of memory")
            continue
        finally:
            inputs.embeddings.grad = inputs.weight.grad = None
        row = Row(*key, name, "ok", *(t * 1e3 for t in times), peak_mb=peak)
        if name == "fused":  # the model of bytes and operations is of Triton's launches
            moved, flops = totals_elsewhere(arch, *key[:3], half=case.dtype == "bf16")
            row.gb_per_s, row.of_copy = moved / times.median / 1e9, moved / times.median / copy
            row.tflop_per_s, row.of_product = flops / times.median / 1e12, flops / times.median / product
        yield row


def measure_steps(backend: str, shape: tuple[int, int, int], device: str, rehearse: bool) -> Iterator[Row]:
    """A row for each way to take a training step with its optimizer, in bf16 products and float32 weights."""
    for kind in optim.PAIRS:
        for place in (0, 2):
            name, work = optim.PAIRS[kind][place : place + 2]
            row = Row(*shape, "bf16", f"{name}, {backend}", "ok")
            try:
                training = optim.Training(*shape[1:], shape[0], 0.1, at=optim.Where(device, backend, torch.bfloat16))
                step = partial(work, training)
                step()  # makes the state
                row.peak_mb = _peak(step, device)
                inner = 1 if rehearse else inner_loops(timed(step, device))
                times = spread([timed(step, device, inner) for _ in range(2 if rehearse else ROUNDS)])
                row.median_ms, row.p20_ms, row.p80_ms = (t * 1e3 for t in times)
            except torch.OutOfMemoryError:
                row.status = "out of memory"
            yield row


def write(path: Path, about: dict[str, str], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in about.items())
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def draw(path: Path, about: dict[str, str], rows: list[Row]) -> None:
    """Time of a step by shape and method."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    good = [row for row in rows if row.status == "ok"]
    labels = list(dict.fromkeys(f"{r.batch} x {r.classes:,} x {r.dim}\n{r.dtype}" for r in good))
    methods = list(dict.fromkeys(r.method for r in good))
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(labels), 4.5), facecolor="white")
    width = 0.8 / max(len(methods), 1)
    for place, method in enumerate(methods):
        of_method = [r for r in good if r.method == method]
        x = [labels.index(f"{r.batch} x {r.classes:,} x {r.dim}\n{r.dtype}") + place * width for r in of_method]
        axes.bar(x, [r.median_ms for r in of_method], width, label=method)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(labels))], labels, fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("ms, forward + backward, median")
    axes.set_title(about["device"], loc="left", fontsize=10)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(row: Row) -> str:
    if row.status != "ok":
        return f"{row.batch} x {row.classes:,} x {row.dim} {row.dtype} {row.method}: {row.status}"
    text = f"{row.batch} x {row.classes:,} x {row.dim} {row.dtype} {row.method}: {row.median_ms:.3f} ms"
    if row.gb_per_s is not None:
        text += (
            f", {row.gb_per_s:.0f} GB/s ({row.of_copy:.0%} of a copy), {row.tflop_per_s:.2f} T/s ({row.of_product:.0%})"
        )
    return text + (f", peak {row.peak_mb:.0f} MB" if row.peak_mb is not None else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU")
    parser.add_argument("--output", type=Path, default=FOLDER / "gpu.csv", help="the CSV; the picture lies beside it")
    args = parser.parse_args(argv)
    if args.rehearse and not interpreted():
        parser.error("--rehearse needs TRITON_INTERPRET=1 in the environment")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no GPU; TRITON_INTERPRET=1 python -m bench.gpu --rehearse runs without one")
    if args.rehearse:
        import tests.gpu_without_gpu.interpreter  # noqa: F401 (Triton's interpreter computes bf16 wrongly without it)
    device = "cpu" if args.rehearse else "cuda"
    about = {"device": device_name(device), "torch": torch.__version__, "arch": str(arch_of(device))}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    for name in asked_for(args.rehearse).values():
        if reasons := fm.why_not(name):
            print(f"backend {name} does not run: {', '.join(reasons)}", file=sys.stderr)
    if not backends(args.rehearse):
        return 1
    broken = 0
    checks = (check(device, args.rehearse) for check in (parity, swept_parity, step_parity))
    for what, failures in itertools.chain.from_iterable(checks):
        print(f"parity {what}: {'; '.join(failures) or 'ok'}", flush=True)
        broken += bool(failures)
    if broken:
        print(f"{broken} checks failed: nothing is timed", file=sys.stderr)
        return 1
    copy, products = rates(device, args.rehearse)
    about |= {"copy": f"{copy / 1e9:.0f} GB/s"} | {f"product {n}": f"{r / 1e12:.2f} T/s" for n, r in products.items()}
    rows = []
    for shape in REHEARSAL if args.rehearse else SHAPES:
        for dtype in ("bf16", "fp32"):
            case = Case(*shape, dtype=dtype, device=device)
            for row in measure(case, arch_of(device), copy, products[dtype], args.rehearse):
                print(_line(row), flush=True)
                rows.append(row)
    heads = list(rows)  # in the picture
    for shape, backend in itertools.product(REHEARSAL if args.rehearse else STEPS, backends(args.rehearse).values()):
        for row in measure_steps(backend, shape, device, args.rehearse):
            print(_line(row), flush=True)
            rows.append(row)
    write(args.output, about, rows)
    if any(row.status == "ok" for row in heads):
        draw(args.output.with_suffix(".png"), about, heads)
    return int(any(row.status.startswith("red gate") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
