"""What a user brings: pictures, folders, tables, listings, splits."""
