"""A model on held-out rows: the losses of their answers, and the answers it gives itself."""
