"""Starts ranks on one host or on many, watches them, and says which one failed first and why."""

from craken.launch.command import main
from craken.launch.env import DEEPSPEED_ENVIRONMENT_NAME
from craken.launch.local import launch_local

__all__ = ["DEEPSPEED_ENVIRONMENT_NAME", "launch_local", "main"]
