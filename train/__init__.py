"""One distributed training run from step a to step b."""
