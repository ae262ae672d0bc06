"""PTX text to a Kernel: registers, variables, labels, instructions; the functions that it may call come first."""

import functools
import re
from collections import namedtuple
from typing import NamedTuple

import numpy as np

from .formats import TYPES, PTXError, u16, u32, u64

FUNCTION = r"\.func\s+(\([^)]*\))?\s*([\w$]+)\s*\(([^)]*)\)\s*\{"
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


def _allocate(end, size, align=16):
    """(offset, new end) of a variable."""
    offset = -(-end // align) * align
    return offset, offset + size


def _size(ty, count):
    return np.dtype(TYPES[ty]).itemsize * int(count or 1)


def vector(operand):
    return split_operands(operand.strip("{} "))


@functools.cache
def parse_address(operand):
    found = re.match(r"\[\s*([\w%$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    return found[1], int(found[2] or "0", 0)


class Function(NamedTuple):
    """A .func: where it starts, and its parameters as variables of private memory; `result` None without one."""

    start: int
    parameters: tuple
    result: str | None


class Kernel:
    """One .entry of a PTX module; `name` may be part of the (mangled) name, None takes the first entry.

    `private` variables lie in each thread's own memory: parameters, those of calls, and .local ones.
    """

    def __init__(self, ptx, name=None):
        ptx = re.sub(r"//[^\n]*", "", ptx)
        pattern = rf"\.visible\s+\.entry\s+([\w$]*{re.escape(name or '')}[\w$]*)\s*\((.*?)\).*?\{{(.*)"
        entry = re.search(pattern, ptx, re.S)
        if entry is None:
            raise PTXError(f"no kernel named {name}")
        self.name = entry[1]
        self.registers, self.labels, self.code = {}, {}, []
        self.private, self.private_bytes, self.functions = {}, 0, {}
        self._scopes, self._number_of_scopes, self._function = [{}], 0, None
        self._shared_variables(ptx)
        self._global_variables(ptx)
        for found in re.finditer(FUNCTION, ptx, re.S):
            self._parse_function(found[2], found[1], found[3], ptx[found.end() :])
        self.params = [self._variable(p) for p in split_operands(entry[2].replace("\n", " "))]
        self.start = len(self.code)
        self._body(entry[3])

    def _shared_variables(self, ptx):
        self.shared, self.static_bytes = {}, 0
        found = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]", ptx)
        for align, ty, name, count in sorted(found, key=lambda v: v[3] == ""):  # dynamic memory follows the static
            size = _size(ty, count) if count else 0
            self.shared[name], self.static_bytes = _allocate(self.static_bytes, size, int(align))

    def _global_variables(self, ptx):
        """Tables with their values, as libdevice has them: {name: bytes}."""
        pattern = r"\.(?:global|const)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([^}]*)\}"
        found = re.findall(pattern, ptx)
        self.tables = {name: np.array([int(v) for v in values.split(",")], np.uint8) for name, _, values in found}

    def _parse_function(self, name, result, parameters, rest):
        self._function = name
        self._scopes.append({})
        result = self._variable(result.strip("() \n"))[0] if result else None
        parameters = tuple(self._variable(p)[0] for p in split_operands(parameters.replace("\n", " ")))
        self.functions[name] = Function(len(self.code), parameters, result)
        self._body(rest)
        self._scopes.pop()
        self._function = None

    def _body(self, text):
        depth, end = 1, 0
        while depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        text = re.sub(r"\bcall(\.uni)?\s[^;]*;", lambda found: found[0].replace("\n", " "), text[: end - 1])
        for statement in re.split(r";|\n", text):
            statement = statement.strip()
            while statement[:1] in ("{", "}"):
                self._scopes.append({}) if statement[0] == "{" else self._scopes.pop()
                statement = statement[1:].strip()
            while label := re.match(r"([\w$]+):\s*", statement):
                self.labels[label[1]] = len(self.code)
                statement = statement[label.end() :]
            if statement.startswith(".reg"):
                self._declare(statement)
            elif statement.startswith((".param", ".local")):
                self._variable(statement)
            elif statement and statement[0] != ".":
                self._instruction(statement)

    def _in_scope(self, name):
        """The name by which a register or variable declared here is known: a scope's own hides one outside."""
        if len(self._scopes) == 1:
            return name
        self._number_of_scopes += 1
        unique = self._scopes[-1][name] = f"{name}.{self._number_of_scopes}"
        return unique

    def _known(self, text):
        if len(self._scopes) == 1:
            return text

        def known(found):
            return next((scope[found[0]] for scope in reversed(self._scopes) if found[0] in scope), found[0])

        return re.sub(r"%?[A-Za-z_$][\w$]*", known, text)

    def _variable(self, declaration):
        """(name, type, bytes) of a parameter or local variable, which gets a place in private memory."""
        found = re.search(r"\s([\w$]+)(?:\[(\d+)\])?$", declaration.strip())
        ty = next(word[1:] for word in declaration.split() if word[1:] in TYPES)
        name, size = self._in_scope(found[1]), _size(ty, found[2])
        self.private[name], self.private_bytes = _allocate(self.private_bytes, size)
        return name, None if found[2] else ty, size

    def _declare(self, statement):
        _, ty, names = statement.split(None, 2)
        dtype = np.bool_ if ty == ".pred" else {"16": u16, "32": u32, "64": u64}[ty[-2:]]
        for name in names.split(","):
            stem, count = re.match(r"(%?[\w$]+?)(?:<(\d+)>)?$", name.strip()).groups()
            for register in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                self.registers[self._in_scope(register)] = dtype

    def _instruction(self, text):
        guard = re.match(r"@(!?)(%?[\w$]+)\s+", text)
        rest = text[guard.end() :] if guard else text
        guard = guard and (self._known(guard[2]), guard[1] == "!")
        op, *operands = rest.split(None, 1)
        op = op.replace("::cta", "").replace("::cluster", "").split(".")
        if op[0] == "call":
            return self._call(operands[0], guard, text)
        args = split_operands(self._known(operands[0])) if operands else ()
        if op[0] == "ret" and self._function:
            op, args = ["return"], (self._function,)
        self.code.append(Instruction(op, args, guard, text))

    def _call(self, operands, guard, text):
        found = re.match(r"(?:\(([^)]*)\)\s*,\s*)?([\w$]+)\s*(?:,\s*\(([^)]*)\))?\s*$", operands)
        if guard or found is None:
            raise PTXError(f"unsupported call: `{text}`")
        result, name, given = found.groups()
        given = split_operands(self._known(given.strip())) if given else ()
        self.code.append(Instruction(["call"], (name, *given), None, text))
        if result:
            self.code.append(Instruction(["result"], (self._known(result.strip()), name), None, text))
