"""Reads the store and draws it."""
