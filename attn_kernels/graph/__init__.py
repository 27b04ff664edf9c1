"""Finding attention in a captured graph of PyTorch calls, and writing this package's ops in its place.

capture.py        the graph of a call, from TorchDynamo
nodes.py          names, arguments and shapes of nodes
axes.py           index variables: where the elements of a tensor come from
views.py          axes followed back through views; contractions.py: through products and sums
writes.py         which values are written to in place; dataflow.py: which tensors are views, which are constants
parts.py          scores, masks, softmax, context, as they are found
additive.py       finds additive scores; dot.py: scores that are products; softmax.py: a softmax over them, a context
guards.py         whether an op may stand in their place
operands.py       its operands, written into the graph by emit.py; rewrite.py: all of it in order
runtime.py        what a rewritten graph calls
keeping.py        which results are kept from call to call; kept.py: keeps them
dead.py           removes what nothing uses
check.py          compares a rewritten graph with the original
"""
