"""`tombola submit`: files that start a run on a cluster, and the commands that hand them over."""
