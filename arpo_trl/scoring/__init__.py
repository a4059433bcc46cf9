"""
Scoring of rows that share prefixes, worth having without ARPO: the tree of a batch (`prefix_tree.py`), one forward over it
(`shared_prefix.py`), and a mixin for any `GRPOTrainer` (`mixin.py`).
"""

from .mixin import SharedPrefixMixin

__all__ = ["SharedPrefixMixin"]
