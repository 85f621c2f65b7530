"""Text in and text out: tokens, generation, perplexity."""
