"""The rows of the table of known keys, by topic."""
