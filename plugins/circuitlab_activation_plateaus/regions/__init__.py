"""Regions: classes of outputs, and the borders that walks cross."""
