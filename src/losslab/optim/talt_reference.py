"""TALT as it is defined, one equation a line: slow, whole matrices, tensor by tensor. `TALT` gives the same numbers.

G gradient as a matrix, C covariance of one side, Q its basis (all of it: the r kept columns, then any others), M and V
averages of the rotated gradient and of its square, s response, U update.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.polar import equalized

RIDGE = 1e-3  # of the mean eigenvalue: directions without any gradient stay where they are


class TALTReference:
    """TALT on tensors that are all of one structure; the settings are those of `TALT`."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        structure: str = "kronecker",
        options: TALTOptions | None = None,
    ) -> None:
        self.options = options or TALTOptions()
        self.lr, self.eps, self.weight_decay, self.structure = lr, eps, weight_decay, structure
        self.betas = (betas[0] if self.options.gradient_smoothing else 0.0, betas[1])
        self.parameters = list(parameters)
        self.states = [self._new(parameter) for parameter in self.parameters]

    def _new(self, parameter: Tensor) -> SimpleNamespace:
        m, n = (1, parameter.numel()) if self.structure == "lowrank" else (len(parameter), parameter[0].numel())
        zero, o = parameter.new_zeros(m, n), self.options
        still = [self.structure == "diagonal" or (o.one_sided and m != n and k == max(m, n)) for k in (m, n)]
        longest, width = 1 if self.structure == "lowrank" else o.max_side, zero.element_size()
        ranks = [k if fixed or k <= longest else o.rank(k, k * width) for k, fixed in zip((m, n), still, strict=True)]
        rows = o.rank(m * n, m * n * width)
        state = SimpleNamespace(t=0, M=zero, V=zero, ranks=ranks, still=still, rows=rows, recent=[])
        state.next, state.cuts, state.peak, state.near = None, None, 0.0, False
        state.Q = [torch.eye(k, dtype=zero.dtype) for k in (m, n)]
        state.C = [zero.new_zeros(k, k if r == k else r) for k, r in zip((m, n), ranks, strict=True)]
        return state

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step of all tensors."""
        for x, g, S in zip(self.parameters, gradients, self.states, strict=True):
            U = self._update(g.reshape(S.M.shape), S).reshape(x.shape)
            x.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * U)

    def _update(self, G: Tensor, S: SimpleNamespace) -> Tensor:
        o, (b1, b2), a = self.options, self.betas, self.options.covariance_decay
        before, S.t = S.M, S.t + 1
        rotated = S.Q[0].T @ G @ S.Q[1]
        S.M = b1 * S.M + (1 - b1) * rotated
        S.V = b2 * S.V + (1 - b2) * (_pooled(rotated**2, S.ranks) if S.t > 1 or all(S.still) else (G**2).mean())
        M, V = S.M / (1 - b1**S.t), S.V / (1 - b2**S.t)
        if o.nesterov and o.gradient_smoothing:
            M = b1 * S.M / (1 - b1 ** (S.t + 1)) + (1 - b1) * rotated / (1 - b1**S.t)
        s = self._response(V, V, S)
        if o.clip < float("inf") and S.cuts is not None:
            middle = self._response(S.cuts[1], V, S)
            s = s.clamp(torch.minimum(middle / o.clip, self._response(V.mean(), V, S)), middle * o.clip)
        if self.structure == "lowrank" and S.t > 1:
            s[:, S.ranks[1] :] = s[:, : S.ranks[1]].min()
        W = equalized((M * s)[None])[0] if o.equalizes and self.structure == "kronecker" else M * s
        U = S.Q[0] @ W @ S.Q[1].T
        S.recent = [*S.recent, G][-S.rows :]
        S.C = [a * C + (1 - a) * self._seen(G, S, side) for side, C in enumerate(S.C)]
        due = S.t == o.next_due(S.t - 1) or (S.t % 5 == 0 and self._triggered(S, before))
        if o.shapes and not all(S.still) and due:
            self._refresh(S)
        return U if o.match_rms is None else U * o.match_rms / (U**2).mean().sqrt()

    def _response(self, V: Tensor, all_V: Tensor, S: SimpleNamespace) -> Tensor:
        o, p = self.options, self.options.power
        rms = all_V.mean().sqrt() + self.eps
        s = (V.sqrt() + self.eps) ** (-2 * p) * rms ** (2 * p - 1) if o.parameter_normalization else torch.ones_like(V)
        if S.cuts is None:
            return s
        cuts = S.cuts[[0, 2]] if o.statistical_thresholds else torch.tensor(o.thresholds, dtype=V.dtype)
        low, high = (torch.sigmoid((cut.log() - V.log()) / o.gate_width) for cut in cuts)
        v = o.valley_strength * (o.near_factor if o.selective_amplification and S.near else 1.0)
        return s * (1 + v * low) * (o.damping + (1 - o.damping) * high)

    def _covariance(self, S: SimpleNamespace, side: int) -> Tensor:
        seen = (self._seen(H, S, side) / len(S.recent) for H in S.recent)
        return S.C[side] if self.options.incremental_covariance else torch.stack(list(seen)).sum(0)

    def _seen(self, G: Tensor, S: SimpleNamespace, side: int) -> Tensor:
        A, r = (G if side == 0 else G.T), S.ranks[side]
        return A @ A.T if r == len(A) else A @ (A.T @ S.Q[side][:, :r])

    def _triggered(self, S: SimpleNamespace, before: Tensor) -> bool:
        o = self.options
        if o.trigger == "gradient_change" or not o.dynamic_updates:
            return o.dynamic_updates and bool((S.M - before).norm() > o.trigger_bound * S.M.norm())
        products = [S.Q[i][:, :r].T @ self._times_basis(S, i) for i, r in enumerate(S.ranks) if not S.still[i]]
        return o.trigger != "none" and any((P - P.diag().diag()).norm() > o.trigger_bound * P.norm() for P in products)

    def _times_basis(self, S: SimpleNamespace, side: int) -> Tensor:
        C = self._covariance(S, side)
        return C @ S.Q[side] if S.ranks[side] == len(S.Q[side]) else C

    def _found(self, S: SimpleNamespace, side: int, first: bool = False) -> tuple[Tensor, Tensor]:
        r, o, A = S.ranks[side], self.options, self._times_basis(S, side)
        old = S.Q[side][:, :r]
        values = (old * A).sum(0)
        order = values.argsort(descending=True)
        if first and r == len(old):
            return order, torch.linalg.eigh(self._covariance(S, side))[1].flip(1)
        mixed = (1 - o.blend) * old * values + o.blend * A if o.transformation_stability else A
        mixed = mixed + RIDGE * values.mean() * old
        return order, torch.linalg.qr(mixed[:, order], mode="complete").Q  # the first r columns span what these do

    def _refresh(self, S: SimpleNamespace) -> None:
        o = self.options
        orders, T = [torch.arange(len(Q)) for Q in S.Q], [torch.eye(len(Q), dtype=Q.dtype) for Q in S.Q]
        for i, r in enumerate(S.ranks):
            if S.still[i]:
                continue
            old = S.Q[i]
            order, S.Q[i] = S.next[i] if o.asynchronous and S.t > 1 else self._found(S, i, S.t == 1)
            orders[i][:r] = order
            T[i] = S.Q[i].T @ old
            if r < len(old):  # C Q for the new Q, of what lies along the old one
                S.C[i] = S.C[i] @ T[i][:r, :r].T
        S.next = [self._found(S, i) for i in (0, 1)] if o.asynchronous else None
        S.M = T[0] @ S.M @ T[1].T
        moved = T[0] ** 2 @ S.V @ (T[1] ** 2).T if o.transformation_stability else S.V[orders[0]][:, orders[1]]
        S.V = _pooled(moved, S.ranks)
        V = S.V / (1 - self.betas[1] ** S.t)
        kept = [slice(r + (r < len(Q))) for r, Q in zip(S.ranks, S.Q, strict=True)]
        levels = torch.tensor([o.percentiles[0], 50.0, o.percentiles[1]], dtype=V.dtype) / 100
        S.cuts = torch.quantile(V[kept[0], kept[1]].flatten(), levels)
        S.peak = max(S.peak, float(V.mean()))
        S.near = float(V.mean()) < o.near_fraction * S.peak


def _pooled(V: Tensor, ranks: Sequence[int]) -> Tensor:
    """Beyond the first r rows and columns all are alike: their mean."""
    V = torch.cat([V[: ranks[0]], V[ranks[0] :].mean(0, keepdim=True).expand(len(V) - ranks[0], -1)])
    return torch.cat([V[:, : ranks[1]], V[:, ranks[1] :].mean(1, keepdim=True).expand(-1, V.shape[1] - ranks[1])], 1)
