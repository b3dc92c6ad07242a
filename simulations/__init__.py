"""Many devices on one machine, driven by the coordinator's own rounds."""
