"""
Scoring of rows that share prefixes, worth having without ARPO: the tree of a batch (`prefix_tree.py`), one forward
over it (`shared_prefix.py`) with its attention (`path_attention.py`), a mixin for any `GRPOTrainer` (`mixin.py`), and
what it saved (`tally.py`).
"""

from .mixin import SharedPrefixMixin

__all__ = ["SharedPrefixMixin"]
