"""Paths: single ones, from senders to receivers, and hypotheses of them."""
