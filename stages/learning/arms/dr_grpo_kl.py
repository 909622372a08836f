"""`dr_grpo` with a penalty on the divergence from the base (`beta` above 0), and samples of its own."""

from stages.learning.policy_gradient import DrGRPO
from stages.learning.policy_gradient import learn_from_validity as train

__all__ = ["Settings", "train"]


class Settings(DrGRPO):
    """Those of `dr_grpo`."""

    stream = "grpo_kl"
