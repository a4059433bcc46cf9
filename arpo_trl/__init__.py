"""ARPO for TRL: `from arpo_trl import ARPOConfig, ARPOTrainer`."""
