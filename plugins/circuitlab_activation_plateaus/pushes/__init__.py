"""Pushes: away from an activation along families of directions, and when the output moves."""
