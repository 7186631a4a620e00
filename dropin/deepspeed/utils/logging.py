"""deepspeed.utils.logging."""

from craken.log import log_dist as log_dist
from craken.log import logger as logger
