"""The web as a tool: `browse.py` shows a page as text, `fetch.py` gets it and refuses what is not public."""
