"""Evaluation: numbers about samples, and the card that states them."""
