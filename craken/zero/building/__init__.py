"""Builds models shard by shard, and puts what is built into groups."""
