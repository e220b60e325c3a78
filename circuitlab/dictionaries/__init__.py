"""Dictionaries: sparse autoencoders and transcoders, their files, and how good they are."""

from __future__ import annotations

from circuitlab.dictionaries.dictionary import Dictionary
from circuitlab.dictionaries.files import read_dictionary, write_dictionary
from circuitlab.dictionaries.info import DictionaryInfo
from circuitlab.dictionaries.stats import DictionaryStats

__all__ = [
    "Dictionary",
    "DictionaryInfo",
    "DictionaryStats",
    "read_dictionary",
    "write_dictionary",
]
