"""The `pocketfed` command; every sub-command imports what it needs when it runs."""
