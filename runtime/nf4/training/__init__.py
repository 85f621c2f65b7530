"""Fine-tuning: the run, a step, its data, its log."""
