"""What step() does: AdamW, the timeline, and where subnets move."""
