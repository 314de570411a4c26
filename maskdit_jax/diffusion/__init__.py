"""Mathematics of noise: knows networks only as functions."""
