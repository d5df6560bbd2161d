"""Races that a compiler's software pipeline leaves in a kernel, read from its TTGIR: no GPU needed, none spent.

On sm_90 a product (`warp_group_dot`) reads its operands from shared memory while the threads go on, until a
`warp_group_dot_wait {pendings = p}` retires all but the last p products. Triton pipelines a loop by copying the tile of
a later iteration into a slot of a buffer meanwhile. A copy into a slot that a product in flight still reads is a race:
the product may take the tile of another iteration, or the zeros that a masked copy writes, and no barrier between
threads prevents it.

Triton 3.6 makes such kernels: a buffer gets the one slot more that a product in flight needs only if the loaded tile
has no other use, but whether the product may stay in flight is decided without asking for that slot. So the loop

    b = tl.load(...); b_square += tl.sum(b * b, 1); b_gram = tl.dot(b, tl.trans(b), b_gram)

is racy with every num_stages above 1, and without the sum it is not. Seen on 2026-11-25 in our `gdn_prepare` with
num_stages=2 (one slot, one product pending): on an H200, at 8192 tokens and 32 heads, 20 of 20 repeats of that stage
gave other bits; at 259 tokens 60 repeats showed nothing. Repeating a run does not find it reliably, hence this.

How: the kernel's text is executed as far as it concerns shared memory. Slot numbers are counters that the pipeline
carries round the loop, computed here from their constants; a loop runs a few times more than any buffer has slots, or
as often as its bounds say if that is less; both sides of an `if` are followed unless its condition is known. Whatever
writes to a slot (asynchronous copy, TMA copy, store from registers) must find no product in flight that reads it.
A reason says what the text allows: where ptxas cannot keep products in flight, it waits for each, which hides the race.

Not judged: reads into registers (`local_load`), which are synchronous; a slot whose number depends on the data; memory
that one buffer takes over from another, which is the allocation's business; whether a wait, which holds for its own
warp group only, is followed by a barrier when there are several; warp-specialised partitions, which synchronise through
barriers in memory; and architectures without `warp_group_dot`: on sm_80 products are synchronous, on sm_100 (tcgen05)
barriers in memory retire them.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

WRITES = (
    "ttg.async_copy_global_to_local", "ttng.async_tma_copy_global_to_local", "ttng.async_tma_gather", "ttg.local_store",
)  # fmt: skip
SAME_VALUE = (
    "ttg.memdesc_trans", "ttg.memdesc_subslice", "ttg.memdesc_reshape", "ttg.memdesc_reinterpret",
    "arith.extsi", "arith.extui",
)  # fmt: skip
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "arith.addi": operator.add, "arith.subi": operator.sub, "arith.muli": operator.mul, "arith.andi": operator.and_,
    "arith.ori": operator.or_, "arith.xori": operator.xor,
}  # fmt: skip
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge
}  # fmt: skip
VALUE = r"%[\w$.-]+(?:#\d+)?"
OPERATION = re.compile(r'((?:%[\w$.-]+(?::\d+)?(?:, )?)+ = )?"?([\w.]+)')


class View(NamedTuple):
    """A part of a buffer: the indices that lead to it, None where one is not known."""

    buffer: str
    path: tuple[int | None, ...] = ()

    def overlaps(self, other: View) -> bool:
        """Whether one certainly lies in the other."""
        if self.buffer != other.buffer:
            return False
        return all(mine is not None and mine == its for mine, its in zip(self.path, other.path))


class Product(NamedTuple):
    """An asynchronous product and the views it reads."""

    name: str
    reads: tuple[View, ...]


@dataclasses.dataclass
class Operation:
    """One operation: its results, and every value that its text mentions beside them."""

    name: str
    text: str
    results: list[str]
    operands: list[str]
    regions: list[list[Operation]] = dataclasses.field(default_factory=list)


def pipeline_races(ttgir: str) -> tuple[str, ...]:
    """The races between a kernel's asynchronous products and what refills their operands.

    Args:
        ttgir: the text of a compiled kernel's TTGIR.

    Returns:
        A reason for each buffer and what overwrites it; none if there is no race, or no `warp_group_dot`.
    """
    if "ttng.warp_group_dot " not in ttgir:
        return ()
    slots = [int(count) for count in re.findall(r"memdesc_(?:index|subview) [^:\n]*: !ttg\.memdesc<(\d+)x", ttgir)]
    execution = _Execution(max(slots, default=1) + 2)
    execution.run(_parse(ttgir))
    reasons = []
    for (write, buffer), (product, *others) in execution.races.items():
        readers = f"{product} and {len(others)} more" if others else product
        slot = f"a slot of {buffer} ({execution.types[buffer]})"
        reasons.append(f"{write} overwrites {slot} that {readers}, in flight, may still read")
    return tuple(reasons)


class _Execution:
    """The operations in order, with what is known of their values.

    `in_flight` has the products that may not have finished, and how many were issued since at least.
    """

    def __init__(self, most_rounds: int) -> None:
        self.most_rounds = most_rounds
        self.values: dict[str, int | View | None] = {}
        self.types: dict[str, str] = {}  # of the buffers
        self.in_flight: dict[Product, int] = {}
        self.races: dict[tuple[str, str], dict[str, None]] = {}  # (what writes, buffer) -> names of the products

    def run(self, block: Sequence[Operation]) -> list[int | View | None]:
        """Runs a block and returns what it yields."""
        yielded: list[int | View | None] = []
        for op in block:
            operands = [self.values.get(name) for name in op.operands]
            results: Sequence[int | View | None] = ()
            if op.name == "scf.yield":
                yielded = operands
            elif op.name == "scf.for":
                results = self._loop(op)
            elif op.name == "scf.if":
                results = self._branch(op, operands[0])
            elif op.name == "ttng.warp_group_dot":
                self._multiply(op, operands)
            elif op.name == "ttng.warp_group_dot_wait":
                results = operands  # handed through
                found = re.search(r"pendings = (\d+)", op.text)
                pendings = int(found[1]) if found else 0
                self.in_flight = {product: since for product, since in self.in_flight.items() if since < pendings}
            elif op.name == "ttg.local_alloc":
                buffer = View(op.results[0])
                self.types[buffer.buffer] = op.text.rpartition("memdesc<")[2].partition(",")[0]
                results = [buffer]
                if operands:  # filled from registers, in a loop each time anew
                    self._write(op, buffer)
            elif op.name in WRITES:
                # the last operand of a TMA copy can switch it off; a mask does not: what is masked is filled with zeros
                if "tma" not in op.name or operands[-1] != 0:
                    self._write(op, next((operand for operand in operands if isinstance(operand, View)), None))
            elif not re.match(r"default$|partition\d+$", op.name):  # of a ttg.warp_specialize
                results = [_compute(op, operands)]
                if op.name == "tt.func":
                    self.in_flight = {}
                for region in op.regions:
                    self.run(region)
            self.values.update(zip(op.results, results))
        return yielded

    def _loop(self, op: Operation) -> list[int | View | None]:
        index, *bounds = op.operands[:4]
        start, stop, step = (self.values.get(name) for name in bounds)
        rounds: Sequence[int | None] = [None] * self.most_rounds
        if isinstance(start, int) and isinstance(step, int) and step > 0:
            end = stop if isinstance(stop, int) else start + step * self.most_rounds
            rounds = range(start, end, step)[: self.most_rounds]
        carried = re.findall(rf"({VALUE}) = ({VALUE})", op.text.partition("iter_args(")[2])
        values = [self.values.get(initial) for _, initial in carried]
        for i in rounds:
            self.values[index] = i
            self.values.update(zip((argument for argument, _ in carried), values))
            values = self.run(op.regions[0])
        return values

    def _branch(self, op: Operation, condition: int | View | None) -> list[int | View | None]:
        then, otherwise = [*op.regions, []][:2]
        sides = [then, otherwise] if condition is None else [then if condition else otherwise]
        before, yielded = self.in_flight, []
        after: dict[Product, int] = {}
        for side in sides:
            self.in_flight = before
            yielded.append(self.run(side))
            for product, since in self.in_flight.items():
                after[product] = min(since, after.get(product, since))
        self.in_flight = after
        return [choices[0] if len(set(choices)) == 1 else None for choices in zip(*yielded)]

    def _multiply(self, op: Operation, operands: list[int | View | None]) -> None:
        if "isAsync = true" not in op.text:  # it is followed by a wait for all
            self.in_flight = {}
            return
        issued = Product(op.results[0], tuple(operand for operand in operands if isinstance(operand, View)))
        self.in_flight = {product: since + 1 for product, since in self.in_flight.items()} | {issued: 0}

    def _write(self, op: Operation, target: View | None) -> None:
        for product in self.in_flight:
            if target is not None and any(view.overlaps(target) for view in product.reads):
                self.races.setdefault((op.name, target.buffer), {})[product.name] = None


def _compute(op: Operation, operands: list[int | View | None]) -> int | View | None:
    """The value of an operation with one result, as far as it matters."""
    first, second = [*operands, None, None][:2]
    if op.name in SAME_VALUE:
        return first
    if op.name in ("ttg.memdesc_index", "ttg.memdesc_subview"):  # the latter up to Triton 3.4
        index = second if isinstance(second, int) else None
        return first._replace(path=(*first.path, index)) if isinstance(first, View) else None
    if op.name == "arith.constant":
        found = re.match(r"(?:(true)|(false)|(-?\d+))(?: :|$)", op.text)
        return None if found is None else int(found[3]) if found[3] else int(bool(found[1]))
    if op.name == "arith.select":
        chosen = operands[1:3] if first is None else [second if first else operands[2]]
        return chosen[0] if len(set(chosen)) == 1 else None
    if isinstance(first, int) and isinstance(second, int):
        if op.name in ARITHMETIC:
            return ARITHMETIC[op.name](first, second)
        if op.name == "arith.cmpi" and op.text.split(",")[0] in COMPARISONS:
            return int(COMPARISONS[op.text.split(",")[0]](first, second))
    return None


def _parse(text: str) -> list[Operation]:
    """The operations at the top, the rest in their regions: a line opens a region with a brace at its end."""
    top = Operation("", "", [], [], [[]])
    open_ops = [top]
    for line in text.splitlines():
        opens = line.rstrip().endswith("{")
        line = line.strip() if opens else re.sub(r"\bloc\(.*", "", line).strip()
        if line.startswith("}"):
            closed = open_ops.pop() if len(open_ops) > 1 else top
            if opens:  # } else {
                closed.regions.append([])
                open_ops.append(closed)
            continue
        found = OPERATION.match(line)
        if found is None:
            continue
        rest = line[found.end() :].strip()
        op = Operation(found[2], rest, _results(found[1] or ""), re.findall(VALUE, rest))
        open_ops[-1].regions[-1].append(op)
        if opens:
            op.regions.append([])
            open_ops.append(op)
    return top.regions[0]


def _results(text: str) -> list[str]:
    """`%a, %b:2 = ` -> %a, %b#0, %b#1."""
    named = re.findall(r"(%[\w$.-]+)(?::(\d+))?", text)
    return [each for name, count in named for each in ([f"{name}#{i}" for i in range(int(count))] if count else [name])]
