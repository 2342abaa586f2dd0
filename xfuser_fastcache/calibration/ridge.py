"""Ridge regression of linear maps, from sums that stay small however many tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from xfuser_fastcache.artifacts.linear_map import LinearMap

Form = Literal["diagonal", "low_rank", "full"]
FORMS: tuple[Form, ...] = get_args(Form)

# Rounds in which diagonal and low-rank part are fitted in turn, each to what the other leaves.
ROUNDS = 8


class RidgeSums:
    r"""All that a linear regression needs to know of its tokens: count, means, centred products.

    Means and centred products are merged (Chan et al. 1979), where subtracting raw sums would
    cancel digits if a mean is large.

    Args:
        dim: D, width of a token.
        dtype: of the sums; float32 is for devices that are slow in float64.
        device: of the sums.

    Attributes:
        tokens: n, tokens counted in, over batches and steps.
        mean_dx, mean_dr: means over tokens, `(D,)`.
        dx_dx: :math:`\sum (x - \bar x)(x - \bar x)^T` of the inputs' changes x, `(D, D)`.
        dx_dr: :math:`\sum (x - \bar x)(r - \bar r)^T` with the residuals' changes r, `(D, D)`.
        dr_dr: :math:`\sum \|r - \bar r\|^2`, `()`.

    Memory: 2 D**2 + 2 D + 1 numbers (D = 3072 in float64: 151 MB), and while `add` runs as much
    again and its tokens twice in `dtype`.
    """

    def __init__(
        self,
        dim: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ):
        self.dim = dim
        self.tokens = 0
        self.mean_dx, self.mean_dr = torch.zeros(2, dim, dtype=dtype, device=device)
        self.dx_dx, self.dx_dr = torch.zeros(2, dim, dim, dtype=dtype, device=device)
        self.dr_dr = torch.zeros((), dtype=dtype, device=device)

    def add(self, dx: torch.Tensor, dr: torch.Tensor) -> None:
        """Count in the tokens of one step.

        Args:
            dx: what goes into the map, `(..., D)`, any floating-point dtype and device.
            dr: what it had better return, same shape.

        Raises:
            ValueError: shapes differ or do not end in D, or a value is not finite; nothing is
                counted in then.
        """
        if dx.shape != dr.shape or dx.shape[-1:] != (self.dim,):
            raise ValueError(
                f"dx has shape {tuple(dx.shape)}, dr {tuple(dr.shape)}; allowed: one shape that "
                f"ends in {self.dim}"
            )
        x, r = (t.detach().reshape(-1, self.dim).to(self.mean_dx) for t in (dx, dr))
        if not len(x):
            return
        mean_x, mean_r = x.mean(0), r.mean(0)
        # A value that is not finite makes its mean so.
        if not (mean_x.isfinite().all() and mean_r.isfinite().all()):
            raise ValueError(
                "dx or dr holds values that are not finite; allowed: finite ones. Leave the step "
                "out, or record in a wider dtype."
            )
        x, r = x - mean_x, r - mean_r
        self._count_in(len(x), mean_x, mean_r, x.T @ x, x.T @ r, r.square().sum())

    def merge(self, other: RidgeSums) -> None:
        """Count in all that `other` has counted; it stays as it is.

        Raises:
            ValueError: it has another dim.
        """
        if other.dim != self.dim:
            raise ValueError(f"the other sums have dim {other.dim}; allowed: {self.dim}")
        held = (other.mean_dx, other.mean_dr, other.dx_dx, other.dx_dr, other.dr_dr)
        self._count_in(other.tokens, *(tensor.to(self.mean_dx) for tensor in held))

    def _count_in(
        self,
        tokens: int,
        mean_dx: torch.Tensor,
        mean_dr: torch.Tensor,
        dx_dx: torch.Tensor,
        dx_dr: torch.Tensor,
        dr_dr: torch.Tensor,
    ) -> None:
        if not tokens:
            return
        share = tokens / (self.tokens + tokens)
        between = self.tokens * share
        step_dx, step_dr = mean_dx - self.mean_dx, mean_dr - self.mean_dr
        self.dx_dx.add_(dx_dx).addr_(step_dx, step_dx, alpha=between)
        self.dx_dr.add_(dx_dr).addr_(step_dx, step_dr, alpha=between)
        self.dr_dr.add_(dr_dr).add_(step_dr @ step_dr, alpha=between)
        self.mean_dx.add_(step_dx, alpha=share)
        self.mean_dr.add_(step_dr, alpha=share)
        self.tokens += tokens

    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.mean_dx, self.mean_dr, self.dx_dx, self.dx_dr, self.dr_dr)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def pooled(sums: Sequence[RidgeSums]) -> RidgeSums:
    """Return the sums over all of `sums`, at least one; they stay as they are."""
    first = sums[0].mean_dx
    total = RidgeSums(sums[0].dim, first.dtype, first.device)
    for part in sums:
        total.merge(part)
    return total


class Regression:
    """The ridge regressions on one set of sums, for all penalties: one eigendecomposition."""

    def __init__(self, sums: RidgeSums):
        tokens = max(sums.tokens, 1)
        self.mean_x, self.mean_r = sums.mean_dx.double(), sums.mean_dr.double()
        self.xx, self.rx = sums.dx_dx.double() / tokens, sums.dx_dr.double().T / tokens
        self.energy = self.xx.diagonal()
        self.rounding = sums.dim * torch.finfo(sums.dx_dx.dtype).eps
        self._spectrum: tuple[torch.Tensor, torch.Tensor] | None = None

    def fit(self, form: Form, rank: int, ridge: float) -> LinearMap:
        """See the function `fit`."""
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")
        highest = len(self.energy) if form == "low_rank" else 0
        if not 0 <= rank <= highest:
            raise ValueError(f"rank is {rank} with form {form!r}; allowed: 0 to {highest}")
        if not ridge >= 0:
            raise ValueError(f"ridge is {ridge}; allowed: a number from 0")
        penalty = ridge * self.energy.mean().item()
        if form == "full":
            held = {"full": self._solve(self.rx, penalty)}
        else:
            held = {"diagonal": self._channels(self.rx.diagonal(), penalty)}
        if form == "low_rank":
            held = self._low_rank(held["diagonal"], rank, penalty)
        held["bias"] = self.mean_r / (1.0 + ridge) - LinearMap(**held).sloped(self.mean_x)
        return LinearMap(**{name: t.float().contiguous() for name, t in held.items()})

    def _low_rank(
        self, diagonal: torch.Tensor, rank: int, penalty: float
    ) -> dict[str, torch.Tensor]:
        dim = len(diagonal)
        u = v = self.xx.new_zeros(dim, rank)
        for _ in range(ROUNDS if rank else 0):
            left = self.rx - diagonal[:, None] * self.xx
            solution = self._solve(left, penalty)
            # W W^T of the whitened solution W = B S^(1/2), since B S = left; its eigenvectors are
            # W's left singular vectors.
            gram = solution @ left.T
            u = torch.linalg.eigh(gram + gram.T).eigenvectors[:, dim - rank :]
            v = solution.T @ u
            explained = (u * (self.xx @ v)).sum(1)
            diagonal = self._channels(self.rx.diagonal() - explained, penalty)
        return {"diagonal": diagonal, "u": u, "v": v}

    def _channels(self, cross: torch.Tensor, penalty: float) -> torch.Tensor:
        """Return the slopes of regressions on one channel each; 0 where the channel rests."""
        return torch.where(self.energy > 0, cross / (self.energy + penalty), 0.0)

    def _solve(self, cross: torch.Tensor, penalty: float) -> torch.Tensor:
        """Return `cross @ S^-1` with `S = xx + penalty`; 0 along directions that rest."""
        if self._spectrum is None:
            self._spectrum = torch.linalg.eigh(self.xx)
        values, vectors = self._spectrum
        moves = values > values[-1] * self.rounding
        inverse = torch.where(moves, 1.0 / (values + penalty), 0.0)
        return (cross @ vectors * inverse) @ vectors.T


def fit(sums: RidgeSums, form: Form, rank: int = 0, ridge: float = 0.0) -> LinearMap:
    r"""Fit a map that shrinks to no change at all, which is what it corrects (`reuse`).

    With centred x (input's change) and r (residual's change) and n tokens it minimises

    .. math:: \tfrac1n \sum \|r - M x\|^2 + \lambda \|M\|_F^2, \qquad
        \lambda = \mathrm{ridge} \cdot \tfrac1{nD} \sum \|x\|^2

    over the maps of the form, and the constant counts as a regressor of the same kind:
    :math:`b = \bar r / (1 + \mathrm{ridge}) - M \bar x`. The penalty is a share of the mean channel
    energy, so that one grid serves spans of all scales.

    - `diagonal`: :math:`M = diag(a)`, one regression a channel.
    - `full`: :math:`M = C_{rx} S^{-1}`, with :math:`S = C_{xx} + \lambda`.
    - `low_rank`: :math:`M = diag(a) + U V^T`, where :math:`U V^T` is the reduced-rank regression of
      what the diagonal leaves over, and the diagonal that of what :math:`U V^T` leaves, in turn
      (each alone would also fit the other's share; the objective, in which both are penalised
      apart, falls at every turn). The objective of a rank-r matrix exceeds that of the
      unrestricted solution :math:`B` by :math:`\|(U V^T - B) S^{1/2}\|_F^2`: errors weigh by how
      much the input moves along them. So the best one is the truncated SVD of the *whitened*
      solution :math:`B S^{1/2}`, brought back. The SVD of :math:`B` itself would spend its ranks on
      directions in which the input hardly moves, where B is large because it is noise.

    Sums are solved in float64. Along directions in which the input does not move at all the map is
    0; no tokens give the zero map.

    Args:
        sums: of the generations to fit on.
        form: one of `FORMS`.
        rank: r of the low rank, 0 <= r <= D; 0 for the other forms.
        ridge: strength, a ratio >= 0; at 1 a slope of a channel of mean energy is halved, at
            infinity the map is 0.

    Returns:
        A float32 map with a bias, on the device of the sums.

    Raises:
        ValueError: an argument out of range.

    Source: reduced-rank regression, Izenman 1975; ridge as in FastCache's `W_l, b_l`, arXiv
    2505.20353, which does not say how they are learnt.
    """
    return Regression(sums).fit(form, rank, ridge)


def error(sums: RidgeSums, linear_map: LinearMap | None) -> float:
    r"""Return the mean squared error of a map's residual change, over tokens and channels.

    From the sums alone: :math:`\frac{1}{nD}\big[\mathrm{tr}(C_{rr} - 2 M C_{xr} + M C_{xx} M^T)
    + n \|\bar r - M \bar x - b\|^2\big]`.

    Args:
        sums: of the tokens to judge on; at least one token.
        linear_map: None is `reuse`, whose error is the mean square of the residual's change.

    Raises:
        ValueError: no token was counted in.
    """
    if not sums.tokens:
        raise ValueError("the sums hold no tokens; an error needs at least one")
    spread, mean = sums.dr_dr.double(), sums.mean_dr.double()
    if linear_map is not None:
        # Not the map's own copy in float64, which it would keep.
        held = linear_map.tensors().items()
        linear_map = LinearMap(**{name: tensor.to(spread) for name, tensor in held})
        # A map acts on rows, and M C_xx M^T is M on the rows of (C_xx M^T)^T.
        crossed = linear_map.sloped(sums.dx_dr.double().T).diagonal().sum()
        moved = linear_map.sloped(linear_map.sloped(sums.dx_dx.double()).T).diagonal().sum()
        spread = spread - 2 * crossed + moved
        mean = mean - linear_map.change(sums.mean_dx.double())
    total = spread.clamp(min=0) / sums.tokens + mean.square().sum()
    return total.item() / sums.dim
