"""What is decided before anything moves, from numbers and names alone: pure functions."""
