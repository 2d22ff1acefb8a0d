from .memory import keep_freed_memory as keep_freed_memory
from .operators.dense import DenseOperator as DenseOperator
from .operators.hessian import Hessian as Hessian
from .operators.risk import EmpiricalRisk as EmpiricalRisk
from .params import ParameterSpace as ParameterSpace
from .solvers.lanczos import eigenpairs as eigenpairs
from .status import Status as Status
