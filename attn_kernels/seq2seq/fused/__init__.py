"""The fused decoder and encoder: a whole target as one autograd node, the steps of a search past the modules, and
layers over sentences of different lengths as a node each.

``eligibility`` says which decoders these may stand for. ``autograd`` is the node of a target: ``sequence`` computes its
steps out of ``cells`` and ``attention``, or ``filtered`` where these read the alignments of the steps before,
``formula`` is their specification, ``cuda_graph`` replays them on a GPU.
``inference`` is the step of a search. ``ragged`` is the node of an encoder's layer, out of ``ragged_cells``.
``cell_steps`` has what a step of a cell computes besides products, and ``gemm`` multiplies for all of them.
"""
