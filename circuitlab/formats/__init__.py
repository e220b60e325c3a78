"""Formats of other programs: each module turns a circuit into one and such a document back.

Documents come from strangers: they are data and never run, XML entities are refused, numbers must
be finite, and what is no circuit is a :class:`~circuitlab.errors.GraphError`.
"""
