"""Data for fine-tuning: files -> examples -> batches."""
