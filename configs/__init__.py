"""Recipes: `base` holds every option once, the other files state how they differ."""
