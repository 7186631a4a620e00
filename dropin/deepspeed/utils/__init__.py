"""deepspeed.utils."""

from craken.engine import RepeatingLoader as RepeatingLoader
from craken.log import log_dist as log_dist
from craken.log import logger as logger
from craken.zero import get_z3_leaf_modules as get_z3_leaf_modules
from craken.zero import set_z3_leaf_module as set_z3_leaf_module
from craken.zero import set_z3_leaf_modules as set_z3_leaf_modules
from craken.zero import set_z3_leaf_modules_by_name as set_z3_leaf_modules_by_name
from craken.zero import set_z3_leaf_modules_by_suffix as set_z3_leaf_modules_by_suffix
from craken.zero import unset_z3_leaf_modules as unset_z3_leaf_modules
from craken.zero import z3_leaf_module as z3_leaf_module
from craken.zero import z3_leaf_parameter as z3_leaf_parameter
from deepspeed.utils import logging as logging
from deepspeed.utils.tensor_fragment import *  # noqa: F403 - all of it is offered here too
