"""
What runs the calls of a model: `executor.py` starts them, `attempts.py` waits for one within its time,
`function_worker.py` runs one in a process of its own, `retries.py` tries again, `cache.py` remembers, `options.py`
says which of it a tool wants.
"""
