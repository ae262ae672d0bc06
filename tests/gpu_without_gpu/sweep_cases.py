"""Sweeps and heads with which every GPU kernel is tested: all rules, reductions, operand dtypes, layouts, options.

Triton's (interpreter/) and those of CUDA C++ (cuda_host/) are held to the same oracle on them, under the error rule.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from fused_margin import ops
from fused_margin.rules import CODES, Rule
from fused_margin.spec import Want

from .. import oracle
from ..cases import MODES, covering
from ..error_rule import ErrorRule
from ..test_primitive import ARGS, Inputs, expected_outputs, outputs

KERNEL_RULES = list(CODES)
OPERANDS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("plain", "index", "2 centers", "3 centers", "shard", "strided")
BATCH, CLASSES = 19, 75
DRAWS = 2  # in 16 bit at first, and twice as many each time that the rule fails: the errors of one draw this small say
MOST = 64  # little, those of each side vary by a factor of 3, and the reference's largest one may be lucky


def hold_to_the_rule(
    operands: torch.dtype, draw: Callable[[int, ErrorRule], None], draws: int = DRAWS, most: int = MOST
) -> None:
    """The error rule over draws: `draw(seed, rule)` adds one."""
    rule, done = ErrorRule(), 0
    exact_enough = operands in (torch.float32, None)
    last, most = (1, 1) if exact_enough else (draws, most)
    while True:
        for seed in range(done, last):
            draw(seed, rule)
        if last >= most or not rule.failures():
            break
        done, last = last, 2 * last
    rule.check()


def clear_of(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The middle of the widest gap between neighbours of the values [..., n] within [low, high]."""
    bounded = torch.cat([values.clamp(low, high), values.new_tensor([low, high]).expand(*values.shape[:-1], 2)], -1)
    ordered = bounded.sort(-1).values
    at = ordered.diff(dim=-1).argmax(-1, keepdim=True)
    return (ordered.gather(-1, at) + ordered.gather(-1, at + 1)).squeeze(-1) / 2


class Sweep(Inputs):
    """Inputs whose masks every precision decides alike, and which run under the error rule in one of the layouts."""

    def __init__(
        self, rule, operands, layout="plain", bias=True, dim=20, seed=0, *, backend, batch=BATCH, classes=CLASSES
    ):
        centers = int(layout.split()[-2]) if "centers" in layout else 1
        super().__init__(batch, classes * centers, dim, rule, False, torch.float32, seed)
        self.backend = backend
        g = torch.Generator().manual_seed(seed + 31)
        self.options, self.changes, self.operands = {}, {"compute_dtype": operands}, operands
        self.labels %= classes
        chosen = classes * 4 // 7
        indexed = layout.startswith("index")
        if indexed:
            index = torch.randperm(classes, generator=g)[:chosen]
            self.labels %= chosen
            rows = (index[:, None] * centers + torch.arange(centers)).flatten()
            self.options["index"] = self.changes["index"] = rows
        if layout == "shard":  # some labels lie before it, one names the column after its last class
            self.labels[:2] = torch.tensor([11, 11 + classes])
            self.options["first_class"] = self.changes["first_class"] = 11
        if centers > 1:
            self.options["sub_centers"] = self.changes["sub_centers"] = centers
        if layout == "strided":
            self.leaves["x"] = self.leaves["x"].detach().T.contiguous().T.requires_grad_()
            self.leaves["w"] = self.leaves["w"].detach().repeat(1, 2).unflatten(1, (2, dim))[:, 0].requires_grad_()
            self.labels = self.labels.repeat_interleave(2)[::2]
            self.leaves["scale"] = torch.tensor(30.0).expand(batch).requires_grad_()
        if bias:
            self.leaves["bias"] = torch.randn(chosen if indexed else classes, generator=g).requires_grad_()
        self._separate_centers(centers, g)
        self._keep_clear(rule)

    def _separate_centers(self, centers, g):
        """Redraws classes of which two centers are so close to a row that rounding may choose the other one."""
        x, w = self.leaves["x"].detach(), self.leaves["w"].data
        for _ in range(1000 if centers > 1 else 0):
            c = (oracle.unit(x.double()) @ oracle.unit(w.double()).T).unflatten(1, (-1, centers))
            first, second = c.topk(2, dim=2).values.unbind(2)
            near = (first - second < 2**-8).any(0).nonzero().squeeze(1)
            if not len(near):
                return
            w.unflatten(0, (-1, centers))[near] = torch.randn(len(near), centers, w.shape[1], generator=g)
        assert centers == 1, "no weights found whose centers are apart"

    def _keep_clear(self, rule):
        with torch.no_grad():
            found = oracle.cosines(self.leaves["x"].double(), self.leaves["w"].double(), self.labels, **self.options)
        if self.tau is not None:
            self.tau = clear_of(found.c, -0.3, 0.3).float()
        self.args = list(ARGS[rule])
        if rule == "clip":
            self.args = [clear_of(found.c.flatten(), *bounds).item() for bounds in ((-0.4, -0.05), (0.05, 0.4))]
        if rule in ("filter", "circle"):
            sign = -1 if rule == "circle" else 1
            self.args[0] = sign * clear_of(found.c.flatten(), *sorted((sign * 0.1, sign * 0.4))).item()

    def check(self, reduction="logsumexp", unit_slope=False, parts=(0, 1, 2), rule=None, device="cpu"):
        """Under the error rule; or, if one is given, only adds this draw to it."""
        want = int(Want.DX | Want.STATS | Want.DSCALE | (Want.SUM if 2 in parts else 0))
        leaves = {name: t.detach().to(device).requires_grad_() for name, t in self.leaves.items()}
        there = lambda t: None if t is None else t.to(device)  # noqa: E731
        changes = dict(self.changes)
        labels, tau, index = map(there, (self.labels, self.tau, changes.pop("index", None)))
        spec = self.spec(self.backend, want=want, reduction=reduction, unit_slope=unit_slope, **changes)
        args = Rule(self.rule, tuple(self.args)).tensor(leaves["x"])
        got = ops.sweep(leaves["x"], leaves["w"], labels, leaves["scale"], tau, leaves.get("bias"), index, args, spec)
        exact, plain = (self._oracle(t, reduction, unit_slope, parts) for t in (torch.float64, torch.float32))
        masks = self.tau is not None
        got = [t.cpu() for t in got]  # autograd goes back through it
        found = outputs(*got, masks) | {name: t.cpu() for name, t in self.gradients(got, leaves, parts).items()}
        if 2 not in parts:
            del found["sum_u"], exact["sum_u"], plain["sum_u"]
        pooled = rule or ErrorRule()
        pooled.add_all(found, plain, exact)
        if rule is None:
            pooled.check()

    def _oracle(self, dtype, reduction, unit_slope, parts):
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in self.leaves.items()}
        rounded = self.operands if dtype == torch.float32 and self.operands != torch.float32 else None
        swept = oracle.sweep(
            leaves["x"], leaves["w"], self.labels, leaves["scale"], None if self.tau is None else self.tau.to(dtype),
            leaves.get("bias"), rule=self.rule, args=tuple(self.args), unit_slope=unit_slope, reduction=reduction,
            operands=rounded, **self.options,
        )  # fmt: skip
        return expected_outputs(swept, self.tau is not None) | self.gradients(swept[:3], leaves, parts)


COMBINATIONS = covering(
    KERNEL_RULES,
    list(OPERANDS),
    ["logsumexp", "softplus"],
    [("flash", False), ("chunk", True), ("chunk", False)],  # form of dX; with the gradient of sum_u, only by chunks
    [False, True],  # unit slope
    list(LAYOUTS),
    [False, True],  # bias
    [20, 32, 37],  # dimensions: below, at, and beyond whole steps of 16
    cost=lambda *_: 1,
)


def combinations() -> Iterator:
    """By default every rule in float32 and every other one in one of the 16-bit types; the others are slow."""
    for number, values in enumerate(COMBINATIONS):
        rule, operands = divmod(number, len(OPERANDS))  # of the first ones, which are all pairs of the two
        half = 1 + rule // 2 % 2 if rule % 2 == 0 else 0
        quick = number < len(KERNEL_RULES) * len(OPERANDS) and operands in (0, half)
        yield pytest.param(*values, marks=() if quick else pytest.mark.slow)


HEADS = [
    *((margin, mode) for margin in ("arcface_linear", "sv_cosface") for mode in MODES if mode != "fp64"),
    *((margin, "fp32") for margin in ("combined_clamp", "sphereface_4", "sphereface_real", "sv_sphereface")),
    ("arcface_detached", "bf16"),
]
