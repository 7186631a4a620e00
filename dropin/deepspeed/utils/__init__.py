"""deepspeed.utils."""

from craken.engine import RepeatingLoader as RepeatingLoader
from craken.log import log_dist as log_dist
from craken.log import logger as logger
from deepspeed.utils import logging as logging
