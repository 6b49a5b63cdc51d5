"""Where images are, in which order they come, and how they become batches."""
