"""Finding attention in a captured graph of PyTorch calls, and writing this package's ops in its place.

capture.py        captures the graph of a call with TorchDynamo
nodes.py          names, arguments and shapes of nodes
axes.py           index variables: where the elements of a tensor come from
views.py          follows axes back through views; contractions.py: through products and sums
writes.py         which values are written to in place; dataflow.py: which tensors are views, which are constants
parts.py          the matched parts: scores, masks, softmax, context
additive.py       finds additive scores; dot.py: scores that are products; softmax.py: a softmax over scores, a context
guards.py         whether an op may replace them
operands.py       the operands of the op; emit.py: writes nodes into the graph; rewrite.py: runs all steps in order
runtime.py        the functions that a rewritten graph calls
keeping.py        which results are cached between calls; kept.py: the cache
dead.py           removes unused nodes
check.py          compares a rewritten graph with the original
"""
