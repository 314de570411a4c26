"""What a program compiled for a GPU does, read from its text: kernels, memory traffic, FLOPs, collectives."""

import math
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

BYTES = {
    "scratch": 0,
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# They start no kernel.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "after-all"}
_LINE = re.compile(r"\s*(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation; arguments: text of the operands; rest: what follows them."""

    name: str
    type: str
    opcode: str
    operands: list[str]
    arguments: str
    rest: str


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations of an HLO module by name, their instructions by name in order, and the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    body: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?(\S+) \(", line)):
            body = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _LINE.match(line):
            operands, rest = _split_call(match[5])
            names = re.findall(r"%([^\s,()]+)", operands)
            body[match[2]] = Instruction(match[2], match[3], match[4], names, operands, rest)
    return computations, entry


def _split_call(text: str) -> tuple[str, str]:
    """`operands), rest` at the parenthesis that closes the call."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def shapes_of(type_text: str) -> list[tuple[str, list[int]]]:
    """Element type and dimensions of every array of a type, tuples flattened."""
    return [(kind, [int(n) for n in dims.split(",") if n]) for kind, dims in _ARRAY.findall(type_text)]


def bytes_of_type(type_text: str) -> int:
    """Bytes of the arrays of a type."""
    return sum(BYTES.get(kind, 4) * math.prod(dims) for kind, dims in shapes_of(type_text))


class _Counts:
    """Sums over the kernels that a call of the entry runs, loops by their trip counts."""

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.kernels: Counter[str] = Counter()
        self.bytes: dict[str, int] = defaultdict(int)
        self.collectives: dict[str, int] = defaultdict(int)
        self.flops = 0
        self.run(self.entry, 1)

    def run(self, name: str, times: int) -> None:
        body = self.computations[name]
        for line in body.values():
            if line.opcode in FREE or line.opcode.endswith("-done"):
                continue
            if line.opcode == "while":
                trips = re.search(r"known_trip_count\W+n\W+(\d+)", line.rest)
                self.run(_called(line, "body"), times * (int(trips[1]) if trips else 1))
                continue
            if line.opcode in ("call", "async-start"):
                self.run(_called(line, "to_apply" if line.opcode == "call" else "calls"), times)
                continue
            kind = kind_of(line, self.computations)
            self.kernels[kind] += times
            moved = sum(self.read(line, i, body) for i in range(len(line.operands)))
            # The bytes of a custom call's result are its scratch memory.
            written = (
                re.sub(r"\b[su]8\[", "scratch[", line.type) if line.opcode == "custom-call" else line.type
            )
            self.bytes[kind] += times * (moved + bytes_of_type(written))
            self.flops += times * self.products(line, body)
            base = line.opcode.removesuffix("-start")
            if base in COLLECTIVES:
                arrays = [body[operand].type for operand in line.operands if operand in body]
                self.collectives[base] += times * sum(map(bytes_of_type, arrays))

    def read(self, line: Instruction, i: int, body: dict[str, Instruction]) -> int:
        """Bytes that an instruction reads of its operand i: of a fusion that only cuts it, the cuts."""
        operand = body.get(line.operands[i])
        if operand is None:
            return 0
        whole = bytes_of_type(operand.type)
        if line.opcode != "fusion":
            return whole
        inner = self.computations[_called(line, "calls")]
        names = {x.name for x in inner.values() if x.opcode == "parameter" and x.arguments == str(i)}
        cuts = 0
        while names:
            users = [x for x in inner.values() if names & set(x.operands)]
            passed = {x.name for x in users if x.opcode == "bitcast"}
            others = [x for x in users if x.opcode != "bitcast"]
            if any(x.opcode not in ("slice", "dynamic-slice") for x in others):
                return whole
            cuts += sum(bytes_of_type(x.type) for x in others)
            names = passed
        return min(cuts, whole) if cuts else whole

    def products(self, line: Instruction, body: dict[str, Instruction]) -> int:
        """FLOPs of the matrix products of a kernel; other arithmetic is not counted."""
        if line.opcode == "fusion":
            inner = self.computations[_called(line, "calls")]
            return sum(self.products(x, inner) for x in inner.values())
        shapes = [shapes_of(body[name].type)[0][1] for name in line.operands[:2] if name in body]
        if "__cudnn$fmha" in line.rest:
            backward = "Backward" in line.rest
            return (10 if backward else 4) * math.prod(shapes[0]) * shapes[1][1]
        cut = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]+)', line.rest)
        if cut is None or not shapes:
            return 0
        size = math.prod(shapes[0][int(d)] for d in cut[1].replace('"', "").split(",") if d)
        return 2 * size * math.prod(shapes_of(line.type)[0][1])


def _called(line: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([^\s,]+)", line.rest)
    assert match, line
    return match[1]


def kind_of(line: Instruction, computations: dict[str, dict[str, Instruction]]) -> str:
    """Class of a kernel: attention, matmul, collective, copy, other custom calls, or elementwise."""
    if line.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', line.rest)
        name = target[1] if target else ""
        return "attention" if "fmha" in name else "matmul" if "cublas" in name else "custom"
    if line.opcode.removesuffix("-start") in COLLECTIVES:
        return "collective"
    if line.opcode == "dot":
        return "matmul"
    return "copy" if line.opcode in ("copy", "copy-start") else "elementwise"


def read_program(text: str) -> dict[str, Any]:
    """Kernels and bytes of memory traffic by class, FLOPs of matrix products, and what to look out for.

    Bytes are what every kernel reads and writes, caches not counted. collective_bytes: operands of one
    device. gelu_epilogues: GELUs that a matrix product does at its end and keeps the input of;
    rolled_copies: updates of a slice of a stack.
    """
    counts = _Counts(text)
    return {
        "kernels": dict(counts.kernels),
        "bytes": dict(counts.bytes),
        "flops": counts.flops,
        "collective_bytes": dict(counts.collectives),
        "attention_calls": text.count('custom_call_target="__cudnn$fmha'),
        "gelu_epilogues": len(re.findall(r'"epilogue":"\w*GELU\w*"', text)),
        "scatters": len(re.findall(r" scatter\(", text)),
        "loops": len(re.findall(r" while\(", text)),
        "rolled_copies": len(re.findall(r" dynamic-update-slice\(", text)),
    }
