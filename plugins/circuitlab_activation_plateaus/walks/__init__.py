"""Walks: from one activation to another, and how the output answers on the way."""
