"""The offline compiler: a checkpoint directory becomes one .nf4 file.

`qcompile.pipeline` is the main path, read top to bottom.
"""
