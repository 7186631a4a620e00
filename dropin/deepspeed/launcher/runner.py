"""deepspeed.launcher.runner."""

from craken.launch import DEEPSPEED_ENVIRONMENT_NAME as DEEPSPEED_ENVIRONMENT_NAME
from craken.launch import main as main
