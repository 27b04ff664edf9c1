"""Letters to phonemes with Seq2Seq, a complete project: ``python -m examples.g2p --help``, and README.md beside this.

data: the dictionary, its split, batches, the count of errors. tasks: the tasks to learn. models: Seq2Seq and its file.
training: steps, validation, checkpoints. evaluation: errors and alignments. recipe: the commands.
"""
