"""What must hold at sizes that a test pool is not for: fresh processes, a gigabyte of weights."""
