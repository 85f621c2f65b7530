"""What is on disk: the .nf4 container, Hugging Face checkpoints, PEFT adapters, and the NF4 block codec."""

__version__ = "0.1.0"
