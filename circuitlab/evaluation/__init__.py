"""Evaluation: how much of a behaviour a circuit keeps, against controls, on pairs it never saw."""
