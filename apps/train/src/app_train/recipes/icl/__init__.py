"""In-context learning with demonstrations."""
