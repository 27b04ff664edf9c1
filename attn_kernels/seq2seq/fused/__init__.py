"""The fused decoder: a whole target as one autograd node, and the steps of a search past the modules.

``eligibility`` says which decoders these may stand for. ``autograd`` is the node of a target: ``sequence`` computes its
steps out of ``cells`` and ``attention``, ``formula`` is their specification, ``cuda_graph`` replays them on a GPU.
``inference`` is the step of a search. ``gemm`` multiplies for all of them.
"""
