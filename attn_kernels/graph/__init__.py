"""Finding attention in a captured graph of PyTorch calls, and writing this package's ops in its place.

axes.py follows the axes of a tensor back through views and contractions, writes.py knows which values are written to
in place, match.py finds additive scores, softmax and context, dot.py scores that are products, parts.py has what they
find, rewrite.py writes the nodes, runtime.py has the functions they
call, kept.py what is made once for many steps, check.py compares a rewritten graph with the original.
"""
