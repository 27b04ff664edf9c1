"""Letters to phonemes with Seq2Seq: ``python -m examples.g2p --help``.

data: the dictionary, its split, batches, the count of errors. tasks: what can be learnt. models: Seq2Seq and its file.
training, evaluation: the recipe. compare: fused against reference attention, a part of ``python -m bench``.
"""
