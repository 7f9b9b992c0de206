"""Per-row gradients: captured in batches, turned into directions, projected, stored."""
