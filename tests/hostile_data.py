"""Hostile data sets: the cases of tests/test_hostile.py for readers of data."""

from damage import content

CASES = [
    ("moments", "metadata is no JSON", content("metadata.json", b"hello"), "metadata.json"),
]
