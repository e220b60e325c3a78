"""Sharpness: which layers, gates and components make the output jump."""
