"""Every tensor of a network at a solution, whatever form that comes in."""

from torch import Tensor, nn

from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution, state_of


def full_state(risk: EmpiricalRisk, solution: Solution, name: str) -> dict[str, Tensor]:
    """Every entry of the model's state dict at a solution; what that lacks is the risk's own model's."""
    chosen = risk.space.named_views(risk.space.vector_of(solution, name).detach())
    state = {key: tensor.detach() for key, tensor in risk.model.state_dict().items()}
    given = state_of(solution)
    state |= {key: given[key].to(state[key].device) for key in state if key in given}
    return tied(risk.model, state | {key: view.clone() for key, view in chosen.items()})


def tied(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied parameters under all their names as under the first."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[name] = state[first.setdefault(id(parameter), name)]
    return state
