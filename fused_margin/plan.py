"""The planner: memory of a rank by item, communication by collective, and a modelled time, before a training starts.

memory   weights R D w + gradient + state + O(B D)          R: rows of the largest shard, M of them sampled
time     sum over the phases of max(operations / rate, bytes / bandwidth), and the collectives
Memory is that of the CPU kernels, and tested against them; times are a model with data-sheet numbers, no measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from .backends.cpu import kept_rows

OPTIMIZERS = ("sgd", "adamw", "sweep-sgd", "sweep-adamw")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_COMPUTE, _BANDWIDTH = 0.6, 0.85  # of a data sheet's rates: assumed, not measured
_NODE, _NETWORK = 8, 50.0  # ranks in one machine; GB/s beyond it, one 400 Gb/s adapter for each rank


class Device(NamedTuple):
    """Numbers of a data sheet: dense, without sparsity."""

    half: float  # TFLOP/s with 16-bit operands and float32 sums
    single: float  # TFLOP/s in float32
    bandwidth: float  # GB/s of memory
    memory: float  # GB
    link: float  # GB/s to other devices in the machine, in one direction
    source: str


DEVICES = {
    "h200": Device(989, 67, 4800, 141, 450, "NVIDIA H200 Tensor Core GPU datasheet, SXM"),
    "h100": Device(989, 67, 3350, 80, 450, "NVIDIA H100 Tensor Core GPU datasheet, SXM"),
    "a100": Device(312, 19.5, 2039, 80, 300, "NVIDIA A100 Tensor Core GPU datasheet, 80GB SXM"),
    "v100": Device(125, 15.7, 900, 32, 150, "NVIDIA V100 Tensor Core GPU datasheet, SXM2 32GB; 16 bit is fp16"),
    "l40s": Device(362, 91.6, 864, 48, 32, "NVIDIA L40S datasheet; PCIe 4.0 x16"),
}


@dataclass(frozen=True)
class Setup:
    """What is to be trained, and on what.

    batch: rows of all ranks together. memory: GB of a rank, None: the device's. optimizer: "sgd" and "adamw" are
    torch.optim's (foreach) with all classes, RowSGD (with momentum) and RowAdamW with sampled ones.
    """

    classes: int
    dim: int = 512
    world: int = 1
    batch: int = 1024
    sample_rate: float = 1.0
    optimizer: str = "sgd"
    weight_dtype: str = "fp32"
    embedding_dtype: str = "fp32"
    sub_centers: int = 1
    mask: bool = False
    device: str = "h100"
    memory: float | None = None
    reserve: float = 0.0

    def __post_init__(self) -> None:
        for name in ("classes", "dim", "world", "batch", "sub_centers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r}; expected a whole number of at least 1, as 30000000 or 30e6")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate = {self.sample_rate}; expected a number above 0, up to 1 (all classes)")
        choices = {"optimizer": OPTIMIZERS, "device": DEVICES, "weight_dtype": BYTES, "embedding_dtype": BYTES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.memory is not None and not 0 < self.memory < math.inf:
            raise ValueError(f"memory = {self.memory}; expected GB of one rank, above 0")
        if not 0 <= self.reserve < self.limit:
            raise ValueError(f"reserve = {self.reserve}; expected GB from 0 to below the {self.limit:g} of a rank")

    @property
    def limit(self) -> float:
        return DEVICES[self.device].memory if self.memory is None else self.memory

    @property
    def shard(self) -> int:
        """Classes of the largest shard."""
        return -(-self.classes // self.world)

    @property
    def sampled(self) -> int:
        """Classes that a step reads there: never fewer than the targets, at worst all different and all here."""
        if self.sample_rate == 1:
            return self.shard
        return min(self.shard, max(math.ceil(self.sample_rate * self.shard), self.batch))

    @property
    def sweeps(self) -> bool:
        return self.optimizer.startswith("sweep-")

    @property
    def adam(self) -> bool:
        return self.optimizer.endswith("adamw")


class Transfer(NamedTuple):
    """One collective of a step: what, and the bytes that a rank sends, as a ring does it."""

    collective: str
    what: str
    bytes: float


class Phase(NamedTuple):
    name: str
    operations: float
    bytes: float


def memory(s: Setup) -> dict[str, float]:
    """Bytes of a rank at the peak of a step, by item."""
    row = s.dim * s.sub_centers  # numbers of a class
    weight, embedding = BYTES[s.weight_dtype], BYTES[s.embedding_dtype]
    items = {"weights": s.shard * row * weight}
    if s.sweeps:
        items["gradient: none, rows kept for step()"] = s.batch * (s.dim * embedding + 12 * 4)
    elif s.sample_rate < 1:
        items["row-sparse gradient"] = s.sampled * (row * weight + 8)
    else:
        items["gradient"] = s.shard * row * weight
    torchs = not s.sweeps and s.sample_rate == 1
    state = weight if torchs else 4
    if s.adam:
        items["two means of Adam"] = s.shard * (2 * row * state + (0 if torchs else 4))
        if torchs:
            items["temporary of torch.optim.AdamW"] = s.shard * row * weight
    else:
        items["momentum"] = s.shard * row * state
    if s.sample_rate < 1:
        items["sampled class numbers"] = s.sampled * 8 * s.sub_centers
    rows = _padded(s)[0]
    # embeddings (in float32 too, where ranks sum their gradient) and labels as gathered; O and dX
    sharded = 0 if s.world == 1 or embedding == 4 else 4
    items["gathered rows"] = s.batch * (s.dim * (2 * embedding + sharded + 4) + 8)
    items["products kept for the gradient"] = 4 * rows * kept_rows(s.batch, s.dim, s.sampled * s.sub_centers, 4)
    items["work space"] = max(_forward_space(s), _backward_space(s))
    return items


def _padded(s: Setup) -> tuple[int, int]:
    return -(-s.batch // 32) * 32, -(-s.dim // 32) * 32


def _forward_space(s: Setup) -> int:
    """x_hat and its panels, and each split's sums (csrc/cpu/problem.h: forward_workspace)."""
    rows, dim = _padded(s)
    groups, tiles = -(-rows // 512), -(-s.sampled // max(1, 96 // s.sub_centers))
    splits = max(1, min(32 // groups, -(-tiles // 2)))
    return 4 * rows * (2 * dim + splits * (7 + dim))


def _backward_space(s: Setup) -> int:
    rows, dim = _padded(s)
    return 4 * rows * 3 * dim


def communication(s: Setup) -> list[Transfer]:
    """What a rank sends in a step; nothing where there is one rank."""
    if s.world == 1:
        return []
    from .partial_fc.ranks import GATHERED_BYTES  # brings torch.distributed, slow to import

    others = (s.world - 1) / s.world
    row = s.dim * BYTES[s.embedding_dtype] + 8
    found = [Transfer("all_gather", "embeddings and labels", others * s.batch * row)]
    if s.mask:
        found.append(Transfer("all_reduce", "target cosines, for the margin's mask", 2 * others * s.batch * 4))
    part = 8 * s.batch  # a vector [B] in float64
    if s.world * 4 * part <= GATHERED_BYTES:
        found.append(Transfer("all_gather", "log-sum-exps, target cosines", (s.world - 1) * 4 * part))
    else:
        found.append(Transfer("all_reduce", "maxima of the log-sum-exps", 2 * others * 2 * part))
        found.append(Transfer("all_reduce", "sums under them, target cosines", 2 * others * 3 * part))
    found.append(Transfer("reduce_scatter", "gradient of the embeddings, fp32", others * s.batch * s.dim * 4))
    return found


def phases(s: Setup) -> list[Phase]:
    """Operations and bytes of memory of a step on a rank: forward with O, dW, and the optimizer's pass."""
    numbers = s.sampled * s.dim * s.sub_centers
    weight, state = BYTES[s.weight_dtype], 2 * 4 * (2 if s.adam else 1)  # the state is read and written
    product = 2.0 * s.batch * numbers
    found = [Phase("forward", 2 * product, numbers * weight)]
    if s.sweeps:
        found.append(Phase("dW sweep with the optimizer's step", 2 * product, numbers * (2 * weight + state)))
    else:
        found.append(Phase("dW sweep", 2 * product, numbers * 2 * weight))
        found.append(Phase("optimizer", 0, numbers * (3 * weight + state)))
    return found


def seconds(s: Setup) -> dict[str, float]:
    """The model: each phase at the slower of its two rates, then the collectives."""
    device = DEVICES[s.device]
    rate = 1e12 * _COMPUTE * (device.single if s.embedding_dtype == "fp32" else device.half)
    found = {p.name: max(p.operations / rate, p.bytes / (1e9 * _BANDWIDTH * device.bandwidth)) for p in phases(s)}
    if s.world > 1:
        found["collectives"] = sum(t.bytes for t in communication(s)) / (1e9 * _BANDWIDTH * _link(s))
    return found


def _link(s: Setup) -> float:
    return DEVICES[s.device].link if s.world <= _NODE else min(_NETWORK, DEVICES[s.device].link)


def total(s: Setup) -> float:
    """GB of a rank, with what is reserved."""
    return sum(memory(s).values()) / 1e9 + s.reserve


def fits(s: Setup) -> bool:
    return total(s) <= s.limit


def most_classes(s: Setup) -> int:
    """The largest number of classes that fits, 0 if none does."""
    low, high = 0, s.world
    while fits(replace(s, classes=high)):
        low, high = high, 2 * high
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(s, classes=middle)) else (low, middle)
    return low


def suggestions(s: Setup) -> list[tuple[str, Setup]]:
    """Single changes that take less memory or time, and the fewest ranks that would do."""
    found = []
    if not s.sweeps:
        name = {"sgd": "SweepSGD", "adamw": "SweepAdamW"}[s.optimizer]
        found.append((f"fm.optim.{name}: no gradient tensor", replace(s, optimizer=f"sweep-{s.optimizer}")))
    if s.sample_rate == 1 and s.classes >= 2_000_000:
        found.append(("sample_rate=0.1", replace(s, sample_rate=0.1)))
    if s.weight_dtype == "fp32" and not fits(s):
        found.append(("weights in bfloat16 (state stays float32)", replace(s, weight_dtype="bf16")))
    if s.embedding_dtype == "fp32":
        found.append(("embeddings in bfloat16, as under autocast", replace(s, embedding_dtype="bf16")))
    better = [(text, other) for text, other in found if _gain(s, other) > 0.02]
    if not fits(s):
        ranks = next((w for w in _rising(s.world) if fits(replace(s, world=w))), None)
        if ranks is not None:
            better.append((f"{ranks} ranks", replace(s, world=ranks)))
    return better


def _rising(world: int) -> list[int]:
    """Numbers of ranks to try: all below 64, then whole machines."""
    return [*range(world + 1, 64), *range(max(64, world + _NODE - world % _NODE), 65_536, _NODE)]


def _gain(s: Setup, other: Setup) -> float:
    """The larger of the relative savings of memory and time."""
    return max(1 - total(other) / total(s), 1 - sum(seconds(other).values()) / sum(seconds(s).values()))


def report(s: Setup) -> str:
    """The plan as text."""
    device, lines = DEVICES[s.device], []
    kind = {True: "all classes", False: f"{s.sampled:,} of them sampled"}[s.sampled == s.shard]
    lines.append(
        f"{s.classes:,} classes x {s.dim} on {s.world} ranks: {s.shard:,} classes each, {kind}; batch {s.batch:,}"
    )
    lines.append("\nmemory of a rank at the peak of a step")
    lines += [f"  {name:38} {_size(value):>10}" for name, value in memory(s).items()]
    lines += [f"  {'reserved, as asked for':38} {_size(s.reserve * 1e9):>10}"] if s.reserve else []
    verdict = "fits" if fits(s) else "DOES NOT FIT"
    lines.append(f"  {'all':38} {_size(total(s) * 1e9):>10}   {verdict} in {s.limit:g} GB")
    lines.append(f"  at most {most_classes(s):,} classes fit this way; the backbone comes on top (--reserve)")
    lines.append("\ncommunication of a rank in a step")
    lines += [f"  {t.collective:15} {t.what:40} {_size(t.bytes):>10}" for t in communication(s)] or ["  none"]
    times = seconds(s)
    lines.append(f"\ntime of the head in a step, MODEL for {s.device}, not a measurement")
    lines += [f"  {name:38} {1e3 * value:>8.2f} ms" for name, value in times.items()]
    lines.append(f"  {'all':38} {1e3 * sum(times.values()):>8.2f} ms")
    rate = device.single if s.embedding_dtype == "fp32" else device.half
    link = f", {_link(s):g} GB/s between ranks" if s.world > 1 else ""
    lines.append(f"  {_COMPUTE:.0%} of {rate:g} TFLOP/s, {_BANDWIDTH:.0%} of {device.bandwidth:g} GB/s{link}")
    lines.append(f"  {device.source}" + (f"; {_NETWORK:g} GB/s: a 400 Gb/s adapter a rank" if s.world > _NODE else ""))
    found = suggestions(s)
    lines += ["\nsuggestions: memory, model time"] if found else []
    for text, other in found:
        change = f"{_size(total(other) * 1e9)}, {1e3 * sum(seconds(other).values()):.2f} ms"
        lines.append(f"  {text:45} {change:>22}{'' if fits(other) else ', does not fit'}")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"
