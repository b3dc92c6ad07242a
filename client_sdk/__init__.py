"""What an app embeds to fine-tune on the device: base dependencies only."""
