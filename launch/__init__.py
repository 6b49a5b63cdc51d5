"""The command, configuration files, recipes, reports and benchmarks."""
