"""Tools of an agent and what runs them."""
