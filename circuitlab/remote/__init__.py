"""Remote execution: passes of a model that a host has, on NDIF or another server of its kind.

What travels is a list of plans, which are plain data, and the source of ``interpreter``. What comes
back is read as tensors in plain containers and nothing else.
"""
