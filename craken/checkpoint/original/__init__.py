"""Reads checkpoints that the original wrote, and turns them into ours."""
