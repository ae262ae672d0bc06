"""PTX text to a Kernel: parameters, registers, shared variables, labels, instructions."""

import functools
import re
from collections import namedtuple

import numpy as np

from .formats import TYPES, PTXError, u16, u32, u64

Instruction = namedtuple("Instruction", "op args pred text")  # pred: (register, negated) or None


@functools.cache
def split_operands(s):
    """Split at commas outside braces and brackets."""
    out, depth, cur = [], 0, ""
    for ch in s:
        depth += (ch in "{[") - (ch in "}]")
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    return tuple([*out, cur.strip()] if cur.strip() else out)


def vector(operand):
    return split_operands(operand.strip("{} "))


@functools.cache
def parse_address(operand):
    found = re.match(r"\[\s*([\w%$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    return found[1], int(found[2] or "0", 0)


class Kernel:
    """One .entry of a PTX module; `name` may be part of the (mangled) name, None takes the first entry."""

    def __init__(self, ptx, name=None):
        ptx = re.sub(r"//[^\n]*", "", ptx)
        pattern = rf"\.visible\s+\.entry\s+([\w$]*{re.escape(name or '')}[\w$]*)\s*\((.*?)\).*?\{{(.*)"
        entry = re.search(pattern, ptx, re.S)
        if entry is None:
            raise PTXError(f"no kernel named {name}")
        self.name = entry[1]
        params = (p.split() for p in split_operands(entry[2].replace("\n", " ")))
        self.params = [(p[-1], next(t[1:] for t in p if t[1:] in TYPES)) for p in params]
        self.registers, self.labels, self.code = {}, {}, []
        self._shared_variables(ptx)
        self._body(entry[3])

    def _shared_variables(self, ptx):
        self.shared, self.static_bytes = {}, 0
        found = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]", ptx)
        for align, ty, name, count in sorted(found, key=lambda v: v[3] == ""):  # dynamic memory follows the static
            self.shared[name] = self.static_bytes = -(-self.static_bytes // int(align)) * int(align)
            self.static_bytes += int(count or 0) * np.dtype(TYPES[ty]).itemsize

    def _body(self, text):
        depth, end = 1, 0
        while depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        for statement in re.split(r";|\n", text[: end - 1]):
            statement = statement.strip().lstrip("{} \t")
            while label := re.match(r"([\w$]+):\s*", statement):
                self.labels[label[1]] = len(self.code)
                statement = statement[label.end() :]
            if statement.startswith(".reg"):
                self._declare(statement)
            elif statement and statement[0] != ".":
                self._instruction(statement)

    def _declare(self, statement):
        _, ty, names = statement.split(None, 2)
        dtype = np.bool_ if ty == ".pred" else {"16": u16, "32": u32, "64": u64}[ty[-2:]]
        for name in names.split(","):
            stem, count = re.match(r"(%?[\w$]+?)(?:<(\d+)>)?$", name.strip()).groups()
            for register in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                self.registers[register] = dtype

    def _instruction(self, text):
        guard = re.match(r"@(!?)(%?[\w$]+)\s+", text)
        rest = text[guard.end() :] if guard else text
        op, *operands = rest.split(None, 1)
        op = op.replace("::cta", "").replace("::cluster", "").split(".")
        args = split_operands(operands[0]) if operands else ()
        self.code.append(Instruction(op, args, guard and (guard[2], guard[1] == "!"), text))
