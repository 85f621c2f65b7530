"""The decoder: layers over packed weights, and how they run forward and backward."""
