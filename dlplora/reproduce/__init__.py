"""Train what is missing, then evaluate."""
