"""Scores from gradients, and the rows they select."""
