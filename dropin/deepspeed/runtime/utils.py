"""deepspeed.runtime.utils."""

from craken.engine import see_memory_usage as see_memory_usage
