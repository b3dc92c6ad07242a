"""pocketfed as a Flower app."""
