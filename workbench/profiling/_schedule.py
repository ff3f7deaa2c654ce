"""What an order of operations does to memory: what lives when, and the least any order needs."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

_STATES = 20_000  # sets of finished operations looked at before the search is given up


@dataclass(frozen=True)
class Operation:
    """One operation of a forward pass; buffers go by number.

    Attributes
    ----------
    reads
        Buffers it reads and leaves as they are.
    writes
        Buffers it makes.
    changes
        Buffers it overwrites in place.
    """

    layer: str
    type: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    changes: tuple[int, ...] = ()

    @property
    def uses(self) -> tuple[int, ...]:
        """Buffers that must be there before it."""
        return tuple(dict.fromkeys((*self.reads, *self.changes)))


@dataclass(frozen=True)
class Trace:
    """The operations of one forward pass in the order they ran, and the buffers between them.

    Attributes
    ----------
    sizes
        Bytes of each buffer.
    inputs, outputs
        Buffers that are there before the first operation, and that must be there after the last.
    """

    operations: tuple[Operation, ...]
    sizes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def bytes(self, buffers: Iterable[int]) -> int:
        """Of several buffers together."""
        return sum(self.sizes[buffer] for buffer in buffers)

    @cached_property
    def readers(self) -> dict[int, int]:
        """For each buffer the operations that need it, as the bits of a number."""
        found = dict.fromkeys(range(len(self.sizes)), 0)
        for index, operation in enumerate(self.operations):
            for buffer in operation.uses:
                found[buffer] |= 1 << index
        return found

    @cached_property
    def before(self) -> list[int]:
        """For each operation those that must run before it and give it something, as bits."""
        writer: dict[int, int] = {}
        since: dict[int, int] = {}
        found = []
        for index, operation in enumerate(self.operations):
            needed = 0
            for buffer in operation.uses:
                needed |= writer.get(buffer, 0)
            for buffer in operation.changes:
                needed |= since.get(buffer, 0)
            for buffer in operation.reads:
                since[buffer] = since.get(buffer, 0) | 1 << index
            for buffer in (*operation.writes, *operation.changes):
                writer[buffer], since[buffer] = 1 << index, 0
            found.append(needed)
        return found

    def released(self, index: int, done: int) -> list[int]:
        """The buffers that nothing needs any more once operation `index` has run after those in `done`."""
        operation, done = self.operations[index], done | 1 << index
        candidates = dict.fromkeys((*operation.uses, *operation.writes))
        return [b for b in candidates if not self.readers[b] & ~done and b not in self.outputs]


def live_bytes(trace: Trace) -> Iterator[tuple[int, list[int]]]:
    """For each operation in order the bytes alive while it runs, and the buffers that are released after it."""
    live, done = trace.bytes(trace.inputs), 0
    for index, operation in enumerate(trace.operations):
        live += trace.bytes(operation.writes)
        released = trace.released(index, done)
        yield live, released
        live -= trace.bytes(released)
        done |= 1 << index


def minimum_bytes(trace: Trace) -> tuple[int, bool]:
    """The least peak of any order of the operations, and whether that is exact; a lower bound where it is not.

    A buffer lives from the operation that makes it to the last one that needs it; nothing is computed twice. Exact
    where the order as it ran reaches the lower bound, and where a search over the sets of finished operations ends
    within 20 000 of them: dynamic programming as in Ahn et al., "Ordering chaos: memory-aware scheduling of irregularly
    wired neural networks for edge devices" (MLSys 2020), section 3.1, best first.
    """
    bound = _lower_bound(trace)
    as_ran = max((live for live, _ in live_bytes(trace)), default=bound)
    if as_ran <= bound:
        return bound, True
    found = _search(trace, bound, as_ran)
    return (bound, False) if found is None else (found, True)


def _lower_bound(trace: Trace) -> int:
    """The most that is alive in any order: at the start, at the end, or while one operation runs.

    While it runs its own buffers are alive, and those made by what must come before it for what must come after it.
    """
    above = []
    for needed in trace.before:
        everything, rest = needed, needed
        while rest:
            last = rest.bit_length() - 1
            everything |= above[last]
            rest = (rest ^ 1 << last) & ~above[last]
        above.append(everything)
    below = [0] * len(above)
    for index, mask in enumerate(above):
        for earlier in _bits(mask):
            below[earlier] |= 1 << index
    maker = {buffer: 1 << i for i, operation in enumerate(trace.operations) for buffer in operation.writes}
    outputs = set(trace.outputs)
    most = max(trace.bytes(trace.inputs), trace.bytes(outputs))
    for index, operation in enumerate(trace.operations):
        alive = {*operation.uses, *operation.writes}
        for buffer, readers in trace.readers.items():
            made = buffer in trace.inputs or maker.get(buffer, 0) & above[index]
            if made and (readers & below[index] or buffer in outputs):
                alive.add(buffer)
        most = max(most, trace.bytes(alive))
    return most


def _search(trace: Trace, bound: int, as_ran: int) -> int | None:
    """The least peak, at least `bound`; None where too many sets of operations would have to be looked at."""
    count = len(trace.operations)
    after: list[list[int]] = [[] for _ in range(count)]
    for index, needed in enumerate(trace.before):
        for earlier in _bits(needed):
            after[earlier].append(index)
    ready = tuple(index for index, needed in enumerate(trace.before) if not needed)
    live = trace.bytes(trace.inputs)
    waiting = [(bound, count, 0, live, ready)]
    settled: set[int] = set()
    while waiting:
        peak, left, done, live, ready = heapq.heappop(waiting)
        if not left:
            return peak
        if done in settled:
            continue
        if len(settled) == _STATES:
            return None
        settled.add(done)
        steps = [_step(trace, index, done, live) for index in ready]
        # what fits under the peak so far and leaves no more behind than it found can only be better done at once
        free = next((i for i, (high, rest) in enumerate(steps) if high <= peak and rest <= live), None)
        for position in range(len(ready)) if free is None else (free,):
            index, (high, rest) = ready[position], steps[position]
            now = done | 1 << index
            # an order no better than the one that ran need not be followed
            if now not in settled and high < as_ran:
                opened = [later for later in after[index] if not trace.before[later] & ~now]
                follow = (*ready[:position], *ready[position + 1 :], *opened)
                heapq.heappush(waiting, (max(high, peak), left - 1, now, rest, follow))
    return as_ran


def _step(trace: Trace, index: int, done: int, live: int) -> tuple[int, int]:
    """Bytes alive while an operation runs, and after it."""
    high = live + trace.bytes(trace.operations[index].writes)
    return high, high - trace.bytes(trace.released(index, done))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
