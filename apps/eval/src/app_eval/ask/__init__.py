"""What a user asks of a finished model."""
