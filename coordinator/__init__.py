"""Runs rounds over the fleet and remembers them in SQL."""
