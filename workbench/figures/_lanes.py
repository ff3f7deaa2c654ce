"""Where the nodes and edges of a data-flow graph lie: one below the other, each branch in a lane of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

Point = tuple[float, float]


class Layout(NamedTuple):
    """Lane of each node, and the bends of each edge from one end to the other; a node's height is its number."""

    lanes: tuple[int, ...]
    paths: tuple[tuple[Point, ...], ...]


class _Run(NamedTuple):
    """What keeps a lane to itself from one height to another: a chain of nodes, or an edge that passes others by."""

    first: int
    last: int
    nodes: tuple[int, ...]
    edge: tuple[int, int] | None


def lay_out(count: int, edges: Sequence[tuple[int, int]]) -> Layout:
    """Lanes for a graph whose nodes are numbered in an order in which every edge goes to the higher number.

    Each node has a height of its own, so that no two labels meet. Nodes that follow one another share a lane, the
    longest way through the graph lane 0. Every other branch, and every edge that passes a node by, has the free lane
    nearest to the mean of its ends (the barycentre of Sugiyama, Tagawa and Toda, IEEE SMC 11, 1981), so that a line
    never runs through a node it does not belong to.
    """
    edges = sorted(set(edges))
    heir, parent = _kin(count, edges)
    runs, carried = _runs(count, edges, heir, parent)
    lanes = [0] * count
    lane_of: dict[tuple[int, int], int] = {}
    taken: dict[int, int] = {}  # height down to which a lane is in use
    for run in sorted(runs, key=lambda r: (r.first, r.first - r.last)):
        ends = run.edge or (parent.get(run.nodes[0]), heir.get(run.nodes[-1]))
        known = [lanes[node] for node in ends if node is not None and node < run.first]
        wanted = sum(known) / len(known) if known else 0.0
        reach = len(taken) + 1
        free = (lane for lane in range(-reach, reach + 1) if taken.get(lane, -1) < run.first)
        lane = min(free, key=lambda lane: (abs(lane - wanted), -lane))
        taken[lane] = run.last
        for node in run.nodes:
            lanes[node] = lane
        for edge in [run.edge] if run.edge else carried.get(run.nodes[0], []):
            lane_of[edge] = lane
    paths = tuple(_path(edge, lanes, lane_of.get(edge)) for edge in edges)
    return Layout(tuple(lanes), paths)


def _kin(count: int, edges: Sequence[tuple[int, int]]) -> tuple[dict[int, int], dict[int, int]]:
    """For each node the one that goes on with its chain, and the one whose chain it goes on with or branches off."""
    after: dict[int, list[int]] = {}
    before: dict[int, list[int]] = {}
    for start, end in edges:
        after.setdefault(start, []).append(end)
        before.setdefault(end, []).append(start)
    up, down = [0] * count, [0] * count  # edges on the longest way to an end of the graph, and from a beginning
    for node in range(count):
        down[node] = max((down[n] + 1 for n in before.get(node, ())), default=0)
    for node in reversed(range(count)):
        up[node] = max((up[n] + 1 for n in after.get(node, ())), default=0)
    heir = {node: max(nexts, key=lambda n: (up[n], -n)) for node, nexts in after.items()}
    parent = {}
    for node, befores in before.items():
        mine = [n for n in befores if heir[n] == node]
        parent[node] = max(mine, key=lambda n: (down[n], -n)) if mine else max(befores)
    return heir, parent


def _runs(
    count: int, edges: Sequence[tuple[int, int]], heir: dict[int, int], parent: dict[int, int]
) -> tuple[list[_Run], dict[int, list[tuple[int, int]]]]:
    """Everything that needs a lane, and by a chain's first node the edges that are drawn in the chain's lane."""
    carried: dict[int, list[tuple[int, int]]] = {}
    runs = []
    for node in range(count):
        before = parent.get(node)
        if before is not None and heir[before] == node:
            continue  # inside a chain
        chain = [node]
        while (following := heir.get(chain[-1])) is not None and parent[following] == chain[-1]:
            chain.append(following)
        mine = list(pairwise(chain))
        if before is not None:
            mine.insert(0, (before, node))
        if following is not None:
            mine.append((chain[-1], following))
        carried[node] = mine
        first = node if before is None else before + 1
        last = chain[-1] if following is None else following - 1
        runs.append(_Run(first, max(last, chain[-1]), tuple(chain), None))
    drawn = {edge for mine in carried.values() for edge in mine}
    runs += [_Run(a + 1, b - 1, (), (a, b)) for a, b in edges if (a, b) not in drawn and b > a + 1]
    return runs, carried


def _path(edge: tuple[int, int], lanes: Sequence[int], lane: int | None) -> tuple[Point, ...]:
    """From node to node: into the edge's lane at once, and out of it just before the end."""
    start, end = edge
    points = [(lanes[start], start), (lanes[end], end)]
    if lane is not None and end > start + 1:
        points[1:1] = [(lane, start + 0.5), (lane, end - 0.5)]
    # a bend that is none would only be one more point to draw
    return tuple(
        (float(x), float(y))
        for i, (x, y) in enumerate(points)
        if i in (0, len(points) - 1) or not points[i - 1][0] == x == points[i + 1][0]
    )
