"""Groups of rows of two profiles that stand for the same layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from workbench.profiling import _match
from workbench.profiling._match import Row
from workbench.profiling.profile import Profile

# numbered by an exporter: the same in another export of another graph means nothing
_NUMBERED = re.compile(r"(?:[A-Z]|node_)\w*_\d+")
_SAME_EXPORT = 0.5  # share of numbered names two profiles have in common, from which they mean the same
# what engines fold into the operation before
_FOLDED = frozenset({"batch norm", "activation", "elementwise", "view"})


class Side:
    """The rows of one profile, and what ties them together."""

    def __init__(self, profile: Profile):
        self.rows = _match.rows(profile)
        self.by_index = {row.index: row for row in self.rows}
        self.computing = [row for row in self.rows if row.kind != "move"]
        self.moves = [row for row in self.rows if row.kind == "move"]
        self.owners: dict[str, list[Row]] = {}
        for row in self.computing:
            for layer in dict.fromkeys(row.layers):
                self.owners.setdefault(layer, []).append(row)
        # the rows of what lies below each path
        self.parts: dict[str, list[Row]] = {}
        for layer, owners in self.owners.items():
            for end in (i for i, letter in enumerate(layer) if letter == "."):
                self.parts.setdefault(layer[:end], []).extend(owners)
        self._after: dict[int, list[int]] = {}
        for row in self.rows:
            for source in row.before:
                self._after.setdefault(source, []).append(row.index)
        self._previous = {row.index: before for before, row in zip(self.computing, self.computing[1:], strict=False)}

    def writers(self, row: Row) -> list[Row]:
        """The computing rows whose numbers a row reads, through moves between them; its own input's first."""
        return self._reached(row, lambda r: r.before)

    def readers(self, row: Row) -> list[Row]:
        """The computing rows that read the numbers of a row, through moves between them."""
        return self._reached(row, lambda r: self._after.get(r.index, ()))

    def sources(self, row: Row) -> list[Row]:
        """The writers of what a row reads or, where the engine tells no dataflow, the row before it."""
        if row.before:
            return self.writers(row)
        return [self._previous[row.index]] if row.index in self._previous else []

    def _reached(self, row: Row, beside: Callable[[Row], Iterable[int]]) -> list[Row]:
        found: dict[int, Row] = {}
        waiting, seen = [row], {row.index}
        while waiting:
            for index in beside(waiting.pop(0)):
                if index in seen or index not in self.by_index:
                    continue
                seen.add(index)
                if self.by_index[index].kind == "move":
                    waiting.append(self.by_index[index])
                else:
                    found[index] = self.by_index[index]
        return list(found.values())


class Groups:
    """Sets of rows of two sides, joined step by step; every row begins alone."""

    def __init__(self, a: Side, b: Side):
        self.sides = (a, b)
        self.how: dict[tuple[int, int], str] = {}
        # a group is called after one of its rows: side and number
        self._group = {
            (number, row.index): (number, row.index) for number, side in enumerate((a, b)) for row in side.rows
        }
        self._members: dict[tuple[int, int], list[set[int]]] = {}
        for number, index in self._group:
            self._members[number, index] = [set(), set()]
            self._members[number, index][number].add(index)

    def of(self, side: int, row: Row) -> tuple[int, int]:
        """The group a row is in."""
        return self._group[side, row.index]

    def rows(self, group: tuple[int, int]) -> list[set[int]]:
        """Row numbers of either side."""
        return self._members[group]

    def matched(self, group: tuple[int, int]) -> bool:
        """Whether it has rows of both sides."""
        return all(self._members[group])

    def join(self, keys: Iterable[tuple[int, Row]], how: str = "") -> None:
        """Make the groups of some rows, each given with its side, one; `how` says why unless they had a reason."""
        groups = sorted({self.of(*key) for key in keys})
        first = groups[0]
        reasons = [self.how.pop(group) for group in groups if group in self.how]
        for other in groups[1:]:
            for number, rows in enumerate(self._members.pop(other)):
                self._members[first][number] |= rows
                self._group.update(((number, row), first) for row in rows)
        # names are the better evidence
        if reasons or how:
            self.how[first] = "names" if "names" in (*reasons, how) else (*reasons, how)[0]

    def members(self) -> list[list[set[int]]]:
        """Row numbers of either side of each group."""
        return list(self._members.values())

    def ordered(self) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
        """Row numbers of either side and the reason, of each group that has both, in the first side's order."""
        found = [
            (tuple(sorted(rows[0])), tuple(sorted(rows[1])), self.how[group])
            for group, rows in self._members.items()
            if all(rows)
        ]
        return sorted(found)


def align(a: Profile, b: Profile) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
    """Row numbers of either profile that stand for the same layers, and whether names or structure tell."""
    groups = Groups(Side(a), Side(b))
    _by_name(groups)
    _by_structure(groups, *(side.computing for side in groups.sides))
    _fold(groups)
    homeless = _moves(groups)
    if all(homeless):
        known = [
            [row for row in side.computing if groups.matched(groups.of(number, row))]
            for number, side in enumerate(groups.sides)
        ]
        _by_structure(groups, *(sorted(x + y, key=lambda row: row.index) for x, y in zip(known, homeless, strict=True)))
    return groups.ordered()


def _by_name(groups: Groups) -> None:
    """Join rows that share layers, and no more than that demands."""
    a, b = groups.sides
    shared = [name for name in a.owners if name in b.owners]
    numbered = [{name for name in side.owners if _NUMBERED.fullmatch(name)} for side in (a, b)]
    if len(numbered[0] & numbered[1]) < _SAME_EXPORT * len(numbered[0] | numbered[1]):
        shared = [name for name in shared if name not in numbered[0]]
    uneven = []
    for name in shared:
        left, right = a.owners[name], b.owners[name]
        if len(left) != len(right) or not all(_same(x, y) for x, y in zip(left, right, strict=True)):
            uneven.append(name)
            continue
        for x, y in zip(left, right, strict=True):  # a layer that is called twice: the first with the first
            # fused into different operations, they cannot be compared
            if name not in numbered[0] or x.family != y.family or _match.alike(x, y):
                groups.join([(0, x), (1, y)], "names")
    for name in uneven:
        _by_uneven_name(groups, name)
    for number, side in enumerate(groups.sides):
        other = groups.sides[1 - number]
        for name, owners in side.owners.items():
            # one layer here, a module made of others there: attention, or a layer replaced by two smaller ones
            if name in other.parts and name not in other.owners and name not in side.parts:
                rows = [(number, row) for row in owners] + [(1 - number, row) for row in other.parts[name]]
                groups.join(rows, "names")


def _same(a: Row, b: Row) -> bool:
    """Whether two rows may be the same call of a layer: where it is alone in both, they compute alike."""
    return len(a.layers) != 1 or len(b.layers) != 1 or a.family == b.family


def _by_uneven_name(groups: Groups, name: str) -> None:
    """Join the rows of a layer that has not as many rows on either side.

    One called several times, and fused with what it follows in one engine, goes with what it follows in the other.
    What is left after that is one operation in one engine and several in the other, or a piece of what has met.
    """
    named = [[(number, row) for row in side.owners[name]] for number, side in enumerate(groups.sides)]
    for number, side in enumerate(groups.sides):
        for _, row in named[number]:
            theirs = {groups.of(*other) for other in named[1 - number]}
            if groups.of(number, row) in theirs:
                continue
            before = [source for source in side.sources(row) if groups.of(number, source) in theirs]
            if before and name not in before[-1].layers:
                groups.join([(number, row), (number, before[-1])])
    met = {groups.of(*key) for key in named[0]} & {groups.of(*key) for key in named[1]}
    left = [[key for key in keys if groups.of(*key) not in met] for keys in named]
    if all(left):
        groups.join([*left[0], *left[1]], "names")
    for number, row in (*left[0], *left[1]):
        _join_piece(groups, number, row, name)


def _join_piece(groups: Groups, number: int, row: Row, name: str) -> None:
    """Join a row without a partner to a matched one beside it that is a piece of the same layer."""
    side = groups.sides[number]
    if groups.matched(groups.of(number, row)):
        return
    for beside in (*side.writers(row), *side.readers(row)):
        if name in beside.layers and groups.matched(groups.of(number, beside)):
            groups.join([(number, row), (number, beside)])
            return


def _by_structure(groups: Groups, a: Sequence[Row], b: Sequence[Row]) -> None:
    """Join rows of groups without a partner that compute the same in the same order."""
    seen = [{row.index for row in rows} for rows in (a, b)]
    known = [[rows & mine for rows, mine in zip(members, seen, strict=True)] for members in groups.members()]
    for left, right in _match.sequence(a, b, [(x, y) for x, y in known if x and y]):
        groups.join([(0, groups.sides[0].by_index[left]), (1, groups.sides[1].by_index[right])], "structure")


def _fold(groups: Groups) -> None:
    """Join rows without a partner to the group whose numbers they work on, where the other engine folded them into it.

    That it did is known where the group has such an operation on the other side only; and, for operations that engines
    fold as a rule, where no row of that family has met one of the other side.
    """
    met = [
        {row.family for row in side.computing if groups.matched(groups.of(number, row))}
        for number, side in enumerate(groups.sides)
    ]
    for number, side in enumerate(groups.sides):
        theirs = groups.sides[1 - number]
        for row in side.computing:
            if groups.matched(groups.of(number, row)):
                continue
            sources = [source for source in side.sources(row) if groups.matched(groups.of(number, source))]
            sources.sort(key=lambda source: -source.index)
            for beside in (*sources, *side.readers(row)):
                members = groups.rows(groups.of(number, beside))
                others = [theirs.by_index[i] for i in members[1 - number]]
                held = {family for other in others for family in (other.family, *other.holds)}
                if row.family in held - {side.by_index[i].family for i in members[number]}:
                    groups.join([(number, row), (number, beside)])
                    break
            else:
                if sources and row.family in _FOLDED - met[number]:
                    groups.join([(number, row), (number, sources[0])])


def _moves(groups: Groups) -> list[list[Row]]:
    """Give moves to groups: in pairs where both sides have them, else to the group they serve; the rest is returned."""
    homes: dict[tuple[int, int], dict[tuple[str, bool], list[list[Row]]]] = {}
    homeless: list[list[Row]] = [[], []]
    for number, side in enumerate(groups.sides):
        for row in side.moves:
            home = _home(groups, number, row)
            if home is None:
                homeless[number].append(row)
            elif groups.matched(home):
                before = row.index < min(groups.rows(home)[number])
                homes.setdefault(home, {}).setdefault((row.type, before), [[], []])[number].append(row)
    for home, kinds in homes.items():
        served = [groups.sides[number].by_index[min(rows)] for number, rows in enumerate(groups.rows(home))]
        for left, right in kinds.values():
            pairs = min(len(left), len(right))
            for x, y in zip(left, right, strict=False):
                groups.join([(0, x), (1, y)], "names" if set(x.layers) & set(y.layers) else "structure")
            for number, rest in ((0, left[pairs:]), (1, right[pairs:])):
                for row in rest:
                    groups.join([(number, row), (number, served[number])])
    return homeless


def _home(groups: Groups, number: int, move: Row) -> tuple[int, int] | None:
    """The group a move serves.

    That of its layers where they are in one group. Of several, the one whose numbers it writes, or else the one that
    reads them. Without layers: the one that reads from it or, where several or none do, that it reads from; one that
    has a partner before one that has none.
    """
    side, theirs = groups.sides[number], groups.sides[1 - number]
    named = {groups.of(number, row) for layer in move.layers for row in side.owners.get(layer, ())}
    if not named:
        named = {groups.of(1 - number, row) for layer in move.layers for row in theirs.owners.get(layer, ())}
    if len(named) == 1:
        return next(iter(named))
    written = [groups.of(number, row) for row in side.writers(move)]
    read = list(dict.fromkeys(groups.of(number, row) for row in side.readers(move)))
    if named:
        return next((group for group in (*written, *read) if group in named), None)
    beside = [*read, *written] if len(read) == 1 else [*written, *read]
    return next((group for group in beside if groups.matched(group)), next(iter(beside), None))
