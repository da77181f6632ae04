"""What is kept on disk: caches, optional packages, and the errors and limits of reading."""
