"""What is measured: one axis varied at a time around 128 x 100,000 x 512, ArcFace, float32, forward and backward."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch

MARGINS = ("arcface", "cosface", "sphereface", "svsoftmax", "normface")
SMALL = (1_000, 10_000)  # classes of the small heads
DTYPES = ("fp32", "bf16")  # bf16: under autocast; embeddings and weights are float32 in both

# What one repeat does, and the floating-point operations, in units of B * D * C, of an algorithm that holds no [B, C]
# matrix: cosines 2, and again for the backward 2, the embeddings' gradient 2, the weights' gradient 2.
MODES = {"forward": 2, "frozen": 4, "train": 8, "step": 8}
MODE_WORDS = {
    "forward": "forward only",
    "frozen": "frozen weights",
    "train": "forward + backward",
    "step": "with optimizer step",
}


@dataclass(frozen=True)
class Case:
    """One head on one input."""

    batch: int = 128
    classes: int = 100_000
    dim: int = 512
    dtype: str = "fp32"
    margin: str = "arcface"
    mode: str = "train"
    threads: int = 2
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What --only is matched with."""
        return (
            f"{self.margin}-{self.dtype}-{self.batch}x{self.classes}x{self.dim}-{self.mode}-{self.device}{self.threads}"
        )

    @property
    def flops(self) -> int:
        """Of the algorithm that recomputes the cosines in the backward."""
        return MODES[self.mode] * self.batch * self.classes * self.dim

    @property
    def trains_weight(self) -> bool:
        return self.mode in ("train", "step")

    @property
    def weight_bytes(self) -> int:
        return self.classes * self.dim * 4

    @property
    def kept_bytes(self) -> int:
        """Of the weights' gradient and momentum, which every method must leave behind."""
        return self.weight_bytes * {"train": 1, "step": 2}.get(self.mode, 0)

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self)


def axes(threads: int = 2, device: str = "cpu") -> dict[str, list[Case]]:
    """The cases of each axis; the centre lies on all of them."""
    centre = Case(threads=threads, device=device)
    found = {
        "classes": [replace(centre, classes=c) for c in (1_000, 10_000, 30_000, 100_000, 1_000_000, 4_300_000)],
        "batch": [replace(centre, batch=b) for b in (32, 128, 512, 1024, 4096)],
        "dim": [replace(centre, dim=d) for d in (128, 512, 1024)],
        "dtype": [
            replace(centre, batch=b, classes=c, dtype="bf16")
            for b, c in ((128, 100_000), (512, 100_000), (128, 1_000_000))
        ],
        "margin": [replace(centre, margin=m) for m in MARGINS],
        "mode": [replace(centre, mode=m) for m in MODES],
        "threads": [replace(centre, threads=t) for t in sorted({1, threads})],
        "small": [replace(centre, batch=64, classes=c) for c in SMALL],
    }
    return found if device == "cpu" else {name: cases for name, cases in found.items() if name != "threads"}


def smoke(threads: int = 2, device: str = "cpu") -> list[Case]:
    """Small ones that between them reach every method, dtype, margin and mode; seconds."""
    base = Case(batch=16, classes=2_000, dim=64, threads=threads, device=device)
    others = [("cosface", "bf16", "frozen"), ("sphereface", "fp32", "forward"), ("svsoftmax", "fp32", "train")]
    others.append(("normface", "bf16", "step"))
    return [base, *(replace(base, margin=margin, dtype=dtype, mode=mode) for margin, dtype, mode in others)]


def select(table: dict[str, list[Case]], axis: list[str] | None = None, only: list[str] | None = None) -> list[Case]:
    """The cases on the axes named whose names match one of the patterns, each once."""
    wanted = axis or list(table)
    unknown = [name for name in wanted if name not in table]
    if unknown:
        raise ValueError(f"axis {', '.join(unknown)}: expected {', '.join(table)}")
    cases = dict.fromkeys(case for name in wanted for case in table[name])
    if only:
        cases = [case for case in cases if any(fnmatch(case.name, f"*{pattern}*") for pattern in only)]
        if not cases:
            names = "\n  ".join(dict.fromkeys(case.name for name in wanted for case in table[name]))
            raise ValueError(f"--only {' '.join(only)} matches no case; expected a part of one of\n  {names}")
    return list(cases)


def axes_of(case: Case, table: dict[str, list[Case]]) -> list[str]:
    return [name for name, cases in table.items() if case in cases]
