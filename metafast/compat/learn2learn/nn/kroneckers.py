"""Linear maps that are Kronecker products of two factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafast.compat import absent

__getattr__ = absent(__name__)


def kronecker_addmm(
    mat1: Tensor,
    mat2: Tensor,
    mat3: Tensor,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    r""":math:`\alpha\, M_1 M_3 M_2 + \beta\, b`: two small products in place of one with ``kron(mat2.T, mat1)``."""
    product = mat1 @ mat3 @ mat2
    scaled = product if alpha == 1.0 else product * alpha
    return scaled if bias is None else scaled.add(bias, alpha=beta)


class KroneckerLinear(nn.Module):
    r""":math:`Y = L X R + B` with learnt factors L and R, which begin as the identity.

    On vectors it is a linear layer whose weight is the Kronecker product of R's transpose and L.

    Args:
        n: rows.
        m: columns.
        bias: whether to add B, zeros at first.
        psd: positive semi-definite factors :math:`L^\top L` and :math:`R^\top R` in place of L and R.
        device: where the factors are; inputs go there and outputs come back.
    """

    def __init__(
        self, n: int, m: int, bias: bool = True, psd: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(n, device=device))
        self.right = nn.Parameter(torch.eye(m, device=device))
        self.bias = nn.Parameter(torch.zeros(n, m, device=device)) if bias else None
        self.psd = psd
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n, m]``, or a vector ``[n * m]`` of its columns one after the other.

        Raises:
            ValueError: another shape.
        """
        n, m = self.left.shape[0], self.right.shape[0]
        vector = x.dim() == 1
        if x.shape != (n * m,) if vector else x.shape[-2:] != (n, m):
            raise ValueError(f"x: expected shape [..., {n}, {m}] or [{n * m}], got {list(x.shape)}")
        given = x.device
        if self.device is not None:
            x = x.to(self.device)
        left: Tensor = self.left
        right: Tensor = self.right
        if self.psd:
            left, right = left.t() @ left, right.t() @ right
        out = kronecker_addmm(left, right, x.reshape(m, n).t() if vector else x, self.bias)
        return (out.t().flatten() if vector else out).to(given)


class KroneckerRNN(nn.Module):
    """A recurrent cell of :class:`KroneckerLinear` maps.

    Args:
        n: rows of input and hidden state.
        m: columns.
        bias: of the maps.
        sigma: of the hidden state; None: tanh.
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma: nn.Module | None = None) -> None:
        super().__init__()
        self.W_h = KroneckerLinear(n, m, bias=bias)
        self.U_h = KroneckerLinear(n, m, bias=bias)
        self.W_y = KroneckerLinear(n, m, bias=bias)
        self.sigma = nn.Tanh() if sigma is None else sigma

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Output and next hidden state."""
        hidden = self.sigma(self.W_h(x) + self.U_h(hidden))
        return self.W_y(hidden), hidden


class KroneckerLSTM(nn.Module):
    """An LSTM cell of :class:`KroneckerLinear` maps.

    Args:
        n: rows of input and states.
        m: columns.
        bias: of the maps.
        sigma: of the gates; None: the logistic function.
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma: nn.Module | None = None) -> None:
        super().__init__()
        # The order of the original, in which its state dicts and optimisers list them.
        for gate in "ifgo":
            for source in "ih":
                self.add_module(f"W_{source}{gate}", KroneckerLinear(n, m, bias=bias))
        self.sigma = nn.Sigmoid() if sigma is None else sigma
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output and next states ``(h, c)``."""
        h, c = hidden
        modules = self._modules
        i, f, g, o = (modules[f"W_i{gate}"](x) + modules[f"W_h{gate}"](h) for gate in "ifgo")  # type: ignore[misc]
        c = self.sigma(f) * c + self.sigma(i) * self.tanh(g)
        h = self.sigma(o) * self.tanh(c)
        return h, (h, c)
