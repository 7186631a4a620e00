"""deepspeed.utils.tensor_fragment: masters, gradients and states of one parameter."""

from craken.zero import safe_get_full_fp32_param as safe_get_full_fp32_param
from craken.zero import safe_get_full_grad as safe_get_full_grad
from craken.zero import safe_get_full_optimizer_state as safe_get_full_optimizer_state
from craken.zero import safe_get_local_fp32_param as safe_get_local_fp32_param
from craken.zero import safe_get_local_grad as safe_get_local_grad
from craken.zero import safe_get_local_optimizer_state as safe_get_local_optimizer_state
from craken.zero import safe_set_full_fp32_param as safe_set_full_fp32_param
from craken.zero import safe_set_full_grad as safe_set_full_grad
from craken.zero import safe_set_full_optimizer_state as safe_set_full_optimizer_state
from craken.zero import safe_set_local_fp32_param as safe_set_local_fp32_param
from craken.zero import safe_set_local_grad as safe_set_local_grad
from craken.zero import safe_set_local_optimizer_state as safe_set_local_optimizer_state
