"""Reads the machine code of NVIDIA kernels: registers, stack, and the instructions of each loop, by name.

It needs cuobjdump and nvdisasm, from the CUDA toolkit or the triton wheel, and no GPU. ``read`` takes a cubin with any
number of kernels; ``parse`` takes the text that the two tools print. Loops are natural loops of the control flow, not
branches to lower addresses: compilers move rare paths behind the end of a function, and a branch back from such a path
is not a loop.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bench import results

# Values that a lane computes with one instruction. Blackwell has instructions for two values.
_ARITHMETIC = {"FFMA": 1, "FADD": 1, "FMUL": 1, "FFMA2": 2, "FADD2": 2, "FMUL2": 2}
_LOCAL = ("LDL", "STL")
_BULK = ("UBLKCP", "UTMALDG")  # copies to shared memory by a copy engine: always wide
_TENSOR = ("HMMA", "HGMMA", "QGMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "OMMA")


@dataclass
class Code:
    """How often each instruction occurs in a piece of code, by full name, such as "LDG.E.128.CONSTANT"."""

    counts: Counter[str] = field(default_factory=Counter)

    def count(self, *names: str) -> int:
        """Instructions with this name or a modifier of it: "MUFU" counts MUFU.RCP, "LDG" does not count LDGSTS."""
        return sum(n for name, n in self.counts.items() if any(_is(name, wanted) for wanted in names))

    @property
    def slots(self) -> int:
        """Issue slots: one for each instruction of a warp."""
        return sum(n for name, n in self.counts.items() if name != "NOP")

    @property
    def special(self) -> int:
        """Operations of the special function unit. Half precision is not cheaper: two values take two operations."""
        return self.count("MUFU")

    @property
    def arithmetic(self) -> int:
        """float32 additions, multiplications and multiply-adds."""
        return sum(n * lanes for name, lanes in _ARITHMETIC.items() for n in [self.count(name)])

    @property
    def local(self) -> int:
        """Loads and stores of local memory: spilled registers, or arrays with a dynamic index."""
        return self.count(*_LOCAL)

    @property
    def tensor(self) -> int:
        """Tensor core instructions."""
        return self.count(*_TENSOR)

    @property
    def global_bytes(self) -> tuple[int, int]:
        """Bytes that a thread loads from global memory: with loads of 16 bytes or more, and with all loads."""
        wide = every = 0
        for name, n in self.counts.items():
            if any(_is(name, bulk) for bulk in _BULK):
                wide, every = wide + 16 * n, every + 16 * n
            elif _is(name, "LDG") or _is(name, "LDGSTS"):
                size = _bytes(name)
                every += size * n
                wide += size * n if size >= 16 else 0
        return wide, every

    def classes(self) -> dict[str, int]:
        """The count of each class of instructions, for tables and files."""
        wide, every = self.global_bytes
        return {
            "slots": self.slots,
            "special": self.special,
            "reciprocals": self.count("MUFU.RCP"),
            "arithmetic": self.arithmetic,
            "global_bytes": every,
            "global_bytes_by_16": wide,
            "shared_loads": self.count("LDS", "LDSM"),
            "local": self.local,
            "tensor": self.tensor,
        }


@dataclass
class Loop(Code):
    """A natural loop with all its instructions."""

    inner: bool = True  # True if it contains no other loop
    start: int = 0  # the address of its first instruction


@dataclass
class Kernel:
    """One kernel, or one device function that others call. Host code cannot launch the name of such a function."""

    name: str  # mangled
    registers: int
    stack: int  # bytes of local memory per thread
    shared: int  # bytes of static shared memory; on sm_90 and later with the 1024 bytes reserved by the system
    code: Code
    loops: list[Loop]

    @property
    def inner_loops(self) -> list[Loop]:
        return [loop for loop in self.loops if loop.inner]


def _is(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(wanted + ".")


def _bytes(name: str) -> int:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[part] for part in name.split(".")[1:] if part in sizes), 4)


# Occupancy ------------------------------------------------------------------------------------------------------------


def blocks_for_registers(registers: int, threads: int) -> int:
    """Blocks that fit in the 65536 registers of a multiprocessor. Warps allocate registers in units of 256.

    Each of the four partitions of a multiprocessor has a quarter of the registers, so warps are counted per partition.
    """
    warps_of_a_part = 16384 // (-(-registers * 32 // 256) * 256)
    return 4 * warps_of_a_part // -(-threads // 32)


# Reading --------------------------------------------------------------------------------------------------------------


def find_tool(name: str, nvcc: Path | None = None) -> Path:
    """Finds cuobjdump or nvdisasm: beside nvcc, on the PATH, or in the triton wheel."""
    places = [] if nvcc is None else [Path(nvcc).parent / name]
    if found := shutil.which(name):
        places.append(Path(found))
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    raise FileNotFoundError(f"{name} was not found: it comes with the CUDA toolkit, and with pip install triton")


def read(cubin: Path, nvcc: Path | None = None, *, allow_none: bool = False) -> list[Kernel]:
    """The kernels of a cubin, in the order of its sections. allow_none: a source with only host code has no kernels."""

    def output(tool: str, option: str) -> str:
        command = [str(find_tool(tool, nvcc)), option, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = output("cuobjdump", "-res-usage")
    if allow_none and "Function " not in usage:
        return []
    return parse(output("nvdisasm", "-c"), usage)


def read_cached(cubin: Path, nvcc: Path | None = None) -> list[Kernel]:
    """Like ``read``, cached in a file beside the cubin: the disassembler takes half a minute for large files."""
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    file = cubin.with_suffix(".json")
    try:
        kept = json.loads(file.read_text())
        if kept["read by"] == key:
            return [
                Kernel(**{**k, "code": Code(Counter(k["code"]["counts"])), "loops": [_loop(one) for one in k["loops"]]})
                for k in kept["kernels"]
            ]
    except (OSError, ValueError, KeyError):
        pass  # missing, or from another version
    kernels = read(cubin, nvcc, allow_none=True)
    text = json.dumps({"read by": key, "kernels": kernels}, default=vars)
    results.write_whole(file, lambda partial: partial.write_text(text))
    return kernels


def _loop(kept: dict) -> Loop:
    return Loop(**{**kept, "counts": Counter(kept["counts"])})


def parse(code: str, usage: str) -> list[Kernel]:
    """Parses the output of ``nvdisasm -c`` and ``cuobjdump -res-usage``."""
    resources = {
        match[1]: {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", match[2])}
        for match in re.finditer(r"Function (\S+):\s*\n\s*(.*)", usage)
    }
    kernels = []
    for section in re.split(r"^\s*\.section\s+", code, flags=re.MULTILINE)[1:]:
        name = re.match(r"\.text\.([^,\s]+)", section)
        if name is None or name[1] not in resources:
            continue
        instructions, labels = _instructions(section)
        used = resources[name[1]]
        kernels.append(
            Kernel(
                name[1],
                used["REG"],
                used["STACK"],
                used["SHARED"],
                Code(Counter(instruction.name for instruction in instructions)),
                _loops(instructions, labels),
            )
        )
    if not kernels:
        raise ValueError("no kernel in what nvdisasm printed")
    return kernels


class _Instruction(NamedTuple):
    address: int
    name: str
    operands: str
    conditional: bool


def _instructions(section: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and for each label the index of the next instruction."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if label := re.match(r"\s*([.$\w]+):\s*$", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.]*)(.*)", line):
            address, predicate, name, operands = found.groups()
            # "BRA.U !UP0, `(...)" and "BRA !P2, `(...)" have their condition among the operands.
            inside = name.startswith("BRA") and re.match(r"\s*!?U?P\w+\s*,", operands)
            conditional = bool(inside) or predicate not in (None, "@PT", "@UPT")
            instructions.append(_Instruction(int(address, 16), name, operands, conditional))
    return instructions, labels


def _successors(instructions: list[_Instruction], labels: Mapping[str, int]) -> tuple[list[list[int]], list[int]]:
    """The successors of each instruction, and the entry points of called functions."""
    barriers: dict[str, int] = {}  # where threads reconverge, by the name of the barrier
    following: list[list[int]] = []
    entries = [0]
    for i, (_, name, operands, conditional) in enumerate(instructions):
        base = name.split(".")[0]
        targets = [labels[label] for label in re.findall(r"[.$][.$\w]*", operands) if label in labels]
        after = [i + 1] if i + 1 < len(instructions) else []
        if base == "BSSY":
            barriers[operands.split(",")[0].strip()] = targets[0]
            following.append(after)
        elif base == "BSYNC":
            meeting = barriers.get(operands.strip(" ;"))
            following.append(after if meeting is None else [meeting])
        elif base == "CALL":
            entries += targets
            following.append(after)
        elif base in ("BRA", "BRX", "JMP", "JMX", "BRXU"):
            following.append(targets + (after if conditional else []))
        elif base in ("EXIT", "RET"):
            following.append(after if conditional else [])
        else:
            following.append(after)
    return following, entries


def _loops(instructions: list[_Instruction], labels: Mapping[str, int]) -> list[Loop]:
    """The natural loops. A back edge goes to an instruction that dominates its source."""
    if not instructions:
        return []
    following, entries = _successors(instructions, labels)
    starts = sorted({0, *entries, *(t for i, f in enumerate(following) if f != [i + 1] for t in [*f, i + 1])})
    starts = [start for start in starts if start < len(instructions)]
    number = {start: n for n, start in enumerate(starts)}
    ends = [*starts[1:], len(instructions)]
    edges = [[number[t] for t in following[end - 1]] for end in ends]
    above = _immediate_dominators(edges, sorted({number[entry] for entry in entries}))
    before: list[list[int]] = [[] for _ in starts]
    for block, targets in enumerate(edges):
        for target in targets:
            before[target].append(block)
    bodies: dict[int, set[int]] = {}  # by the first block, so that a loop with two back edges is one loop
    for block, targets in enumerate(edges):
        for head in targets:
            if block not in above or not _dominates(above, head, block):
                continue
            body, todo = bodies.setdefault(head, {head}), [block]
            while todo:
                member = todo.pop()
                if member not in body:
                    body.add(member)
                    todo += before[member]
    loops = []
    for head, body in sorted(bodies.items()):
        if len(body) == 1 and ends[head] - starts[head] == 1:
            continue  # a branch to itself, which every function ends with
        counts: Counter[str] = Counter()
        for block in body:
            counts.update(instruction.name for instruction in instructions[starts[block] : ends[block]])
        inner = not any(other in body for other in bodies if other != head)
        loops.append(Loop(counts, inner, instructions[starts[head]].address))
    return loops


def _immediate_dominators(edges: list[list[int]], entries: list[int]) -> dict[int, int]:
    """For each reachable block its immediate dominator; -1 is the common root.

    The iterative algorithm of Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm" (2001).
    """
    order: list[int] = []  # postorder
    seen = set(entries)
    for entry in entries:
        stack = [(entry, iter(edges[entry]))]
        while stack:
            block, rest = stack[-1]
            unseen = next((target for target in rest if target not in seen), None)
            if unseen is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(unseen)
                stack.append((unseen, iter(edges[unseen])))
    place = {block: n for n, block in enumerate(order)} | {-1: len(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in edges[block]:
            before[target].append(block)
    for entry in entries:
        before[entry].append(-1)
    above = {-1: -1}
    changed = True
    while changed:
        changed = False
        for block in reversed(order):
            found = None
            for one in before[block]:
                if one not in above:
                    continue
                other = one if found is None else found
                while one != other:  # up to the common dominator
                    if place[one] < place[other]:
                        one = above[one]
                    else:
                        other = above[other]
                found = one
            if found is not None and above.get(block) != found:
                above[block], changed = found, True
    return above


def _dominates(above: Mapping[int, int], head: int, block: int) -> bool:
    while block != head and block != -1:
        block = above[block]
    return block == head


# Names ----------------------------------------------------------------------------------------------------------------


def demangle(name: str) -> str:
    """The C++ name with template arguments and without parameters; a name that is not mangled is unchanged."""
    library = ctypes.util.find_library("stdc++")
    try:
        convert = ctypes.CDLL(library or "libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return name
    convert.restype = ctypes.c_void_p
    status = ctypes.c_int()
    found = convert(name.encode(), None, None, ctypes.byref(status))
    if status.value != 0 or not found:
        return name
    text = ctypes.string_at(found).decode()
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(found)
    return _without_parameters(text)


def _without_parameters(name: str) -> str:
    """Reduces "void f<(Kind)1>(int, g(*)(int))" to "f<(Kind)1>"."""
    depth = 0
    for i in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[i], 0)
        if name[i] == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def template_arguments(name: str) -> list[str]:
    """The last template arguments in a demangled name: "3" and "float" for "attn::cuda::many<3, float>"."""
    if not name.endswith(">"):
        return []
    depth, parts, part = 0, [], ""
    for sign in reversed(name):
        depth += {">": 1, ")": 1, "<": -1, "(": -1}.get(sign, 0)
        if depth == 0:
            break
        if sign == "," and depth == 1:
            parts.append(part)
            part = ""
        elif not (sign == ">" and depth == 1):
            part += sign
    return [text[::-1].strip() for text in [*parts, part]][::-1]
