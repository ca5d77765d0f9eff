"""The functional API, registered as ``torch.library`` custom ops: schema, CPU, CUDA and fake.

CPU tensors (and float64 anywhere) take the plain-torch form beside the op, ``name_plain``: the same
dtypes, arithmetic in float32 (float64 for float64), and the error that a kernel may at most double.
CUDA tensors take the Triton kernels, imported on first use. Names that end in ``_`` write their
arguments. Order is always (out, in); ``t`` counts tokens.
"""

from .adamw import subnet_adamw_, subnets_adamw_
from .cross_entropy import cross_entropy_block_grad_, cross_entropy_grad_
from .gather import gather_features
from .importance import importance_marginals, importance_update_
from .scores import score_marginals
from .subnet_grad import subnet_grad

__all__ = [
    "cross_entropy_block_grad_",
    "cross_entropy_grad_",
    "gather_features",
    "importance_marginals",
    "importance_update_",
    "score_marginals",
    "subnet_adamw_",
    "subnet_grad",
    "subnets_adamw_",
]
