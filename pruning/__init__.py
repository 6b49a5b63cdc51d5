"""Lottery tickets: masks, scores, exact thresholds, ticket files, and each method as a program."""
