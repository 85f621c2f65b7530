"""The offline compiler: a checkpoint directory becomes one .nf4 file."""
