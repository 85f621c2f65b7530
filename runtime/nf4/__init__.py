"""The runtime: maps a .nf4 file, runs it, fine-tunes it with LoRA, generates text."""
