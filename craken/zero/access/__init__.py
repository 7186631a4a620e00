"""What users and clients see of sharded parameters, masters and states."""
