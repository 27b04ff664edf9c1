"""Whether an op may replace matched nodes: nothing else uses them, and nothing writes to their inputs in between."""

from __future__ import annotations

from torch.fx import Node

from .axes import NoMatch
from .nodes import is_tensor, value_of
from .parts import Leaf, Products, Scores
from .writes import Writes, written


def check_additive(writes: Writes, scores: Scores, roots: set[Node], at: Node) -> None:
    for term in scores.terms:
        check_leaf(writes, term.leaf, at)
        if term.projection is not None:
            check_leaf(writes, term.projection.weight, at)
    check_leaf(writes, scores.v, at)
    if not writes.same_mode(scores.node, at):
        raise NoMatch("grad mode or autocast is switched between")
    if not is_exclusive(scores.tanh, roots):
        raise NoMatch("scores or their tanh are used for something else, too")


def check_products(writes: Writes, scores: Products, roots: set[Node], at: Node) -> None:
    if value_of(scores.node).device.type != "cpu":
        raise NoMatch("dot attention on a GPU, where the two are not timed")
    for leaf in (scores.query, scores.keys):
        check_leaf(writes, leaf, at)
    if not writes.same_mode(scores.node, at):
        raise NoMatch("grad mode or autocast is switched between")
    if not is_exclusive(scores.node, roots):
        raise NoMatch("scores are used for something else, too")


def check_leaf(writes: Writes, leaf: Leaf, at: Node) -> None:
    if not writes.unchanged(leaf.node, leaf.reader, at):
        raise NoMatch("a value is written to in place before it would be used")


def is_exclusive(node: Node, roots: set[Node]) -> bool:
    """Whether a value is used only to compute the roots."""
    reached, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if user in roots or user in reached:
                continue
            if user.op == "output":
                return False
            reached.add(user)
            waiting.append(user)
            for target in written(user):
                if target not in reached and not _is_dead_storage(target, reached):
                    return False
    return True


def _is_dead_storage(target: Node, reached: set[Node]) -> bool:
    """Whether the target of a write is a view of one of the reached values, which are unused themselves."""
    while target not in reached:
        sources = [source for source in target.all_input_nodes if is_tensor(source)]
        if len(sources) != 1 or target.op == "placeholder":
            return False
        target = sources[0]
    return True
