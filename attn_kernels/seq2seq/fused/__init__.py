"""The fused decoder and encoder: a whole target as one autograd node, search steps that bypass the modules, and one
node for each layer over sentences of different lengths.

``eligibility`` decides which decoders these may replace. ``autograd`` is the node of a target. ``sequence`` computes
its steps with ``cells`` and an attention: ``attention``, or ``filtered`` if it adds filtered alignments to its keys, or
``called`` (and ``collected``) if each step calls its module. ``formula`` is their specification; ``cuda_graph``
replays them on a GPU. ``inference`` is a search step. ``ragged`` is the node of an encoder layer, with
``ragged_cells``. ``distinct`` computes the products of equal tokens once. ``projected`` multiplies the values of the
attention with the weight that reads its context. ``cell_steps`` has the elementwise part of a cell step, and ``gemm``
the matrix products of all of them.
"""
