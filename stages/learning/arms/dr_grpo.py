"""Policy gradient on the model's own samples, minus their mean reward at each prompt (Dr. GRPO; Liu et al. 2025)."""

from stages.learning.policy_gradient import DrGRPO as Settings
from stages.learning.policy_gradient import learn_from_validity as train

__all__ = ["Settings", "train"]
