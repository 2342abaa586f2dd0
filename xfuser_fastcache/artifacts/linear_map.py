"""Linear maps: how a span's residual changes with the span's input."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from xfuser_fastcache.models.streams import Streams

# Pseudo-observations at a slope of zero of the online fit, as a share of the mean channel energy.
ONLINE_RIDGE = 1.0

# Residuals are about as large as what they change with.
LARGEST_ENTRY = 1e6

# Tensors of a map -> the letters of their dimensions.
SHAPES = {"diagonal": "D", "u": "Dr", "v": "Dr", "full": "DD", "bias": "D"}


@dataclass(frozen=True, eq=False)
class LinearMap:
    r"""A correction on top of an anchored residual, fitted or fine-tuned.

    From the input's change :math:`\Delta x` (what the span's input differs by from what it is
    measured against) it gives the residual's change, in the same units:

    .. math:: \Delta r = a \odot \Delta x + U V^T \Delta x + b
        \quad\text{or}\quad \Delta r = W \Delta x + b

    A map that is nothing at all does not exist: "no map" is None, and stands for `reuse`.

    Args:
        diagonal: `a`, `(D,)`.
        u: `U`, `(D, r)` with `0 <= r <= D`; comes with `v`.
        v: `V`, `(D, r)`.
        full: `W`, `(D, D)`, row = channel of the residual; stands alone but for the bias.
        bias: `b`, `(D,)`.

    All are floating-point tensors of one dtype and device; those not used are None.

    Raises:
        ValueError: shapes, dtypes, devices or the choice of tensors do not go together; the message
            begins with the tensor's name.

    Example:
        A map's tensors are ordinary parameters, here tuned by one gradient step:

        >>> fitted = LinearMap(diagonal=torch.zeros(2))
        >>> own = {name: t.clone().requires_grad_() for name, t in fitted.tensors().items()}
        >>> tuned = LinearMap(**own)
        >>> dx, dr = torch.ones(1, 3, 2), torch.full((1, 3, 2), 0.5)
        >>> optimizer = torch.optim.SGD(own.values(), lr=1.0)
        >>> (tuned.change(dx) - dr).square().mean().backward()
        >>> optimizer.step()
        >>> tuned.to_tensors("span")
        {'span.diagonal': tensor([0.5000, 0.5000])}

    Source: FastCache, arXiv 2505.20353, the block-level linear approximation `W_l h + b_l`.
    Deviation: it maps changes and not states, so that without it the last residual stays.
    """

    diagonal: torch.Tensor | None = None
    u: torch.Tensor | None = None
    v: torch.Tensor | None = None
    full: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    _casts: dict[tuple[torch.dtype, torch.device], LinearMap] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        held = self.tensors()
        if not held:
            raise ValueError("diagonal, u and v, full or bias is needed; for no map, use None")
        if self.full is not None and (extra := held.keys() & {"diagonal", "u", "v"}):
            raise ValueError(f"full stands alone or with bias; allowed: leave out {sorted(extra)}")
        if (self.u is None) != (self.v is None):
            given, missing = ("v", "u") if self.u is None else ("u", "v")
            raise ValueError(f"{given} is given without {missing}; allowed: both or neither")
        sizes: dict[str, int] = {}
        first = next(iter(held.values()))
        for name, tensor in held.items():
            letters, shape = SHAPES[name], tuple(tensor.shape)
            bound = dict(sizes)
            fits = len(shape) == len(letters) and all(
                sizes.setdefault(letter, size) == size
                for letter, size in zip(letters, shape, strict=True)
            )
            if not fits or sizes.get("r", 0) > sizes["D"]:
                known = "".join(f", {letter} = {size}" for letter, size in bound.items())
                raise ValueError(
                    f"{name} has shape {shape}; allowed: ({', '.join(letters)}), r <= D{known}"
                )
            if not tensor.is_floating_point() or tensor.dtype != first.dtype:
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}; allowed: one floating-point dtype for all "
                    f"tensors of a map, the first has {first.dtype}"
                )
            if tensor.device != first.device:
                raise ValueError(
                    f"{name} is on {tensor.device}; allowed: {first.device}, as others"
                )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are used, by name; the map's own, not copies."""
        named = {name: getattr(self, name) for name in SHAPES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def dim(self) -> int:
        """D, the width of a token."""
        return next(iter(self.tensors().values())).shape[0]

    @property
    def multiply_adds_per_token(self) -> int:
        """Cost of `change`: D for the diagonal, 2Dr for the low rank, D**2 in full."""
        held = self.tensors()
        return sum(tensor.numel() for name, tensor in held.items() if name != "bias")

    def nbytes(self) -> int:
        """Bytes held, copies in other dtypes and on other devices included."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
        return own + sum(cast.nbytes() for cast in self._casts.values())

    def to(self, dtype: torch.dtype, device: torch.device | str) -> LinearMap:
        """Return the map in another dtype or on another device, made once and kept.

        A map whose tensors require gradients is copied anew each time, since they change in place.
        """
        key = (dtype, torch.device(device))
        held = self.tensors()
        first = next(iter(held.values()))
        if key == (first.dtype, first.device):
            return self
        if key in self._casts:
            return self._casts[key]
        cast = LinearMap(**{name: t.to(device=key[1], dtype=dtype) for name, t in held.items()})
        if not any(tensor.requires_grad for tensor in held.values()):
            self._casts[key] = cast
        return cast

    def sloped(self, dx: torch.Tensor) -> torch.Tensor:
        """Return `change` but for the bias, for `dx` of the map's own dtype and device."""
        if self.full is not None:
            return dx @ self.full.T
        moved = torch.zeros_like(dx) if self.diagonal is None else dx * self.diagonal
        if self.u is not None and self.v is not None:
            moved = moved + (dx @ self.v) @ self.u.T
        return moved

    def change(self, dx: torch.Tensor) -> torch.Tensor:
        """Return the residual's change for the input's change.

        Args:
            dx: `(..., D)`.

        Returns:
            Shape, dtype and device of `dx`.
        """
        held = self.to(dx.dtype, dx.device)
        moved = held.sloped(dx)
        return moved if held.bias is None else moved + held.bias

    def to_tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors under the names `prefix.diagonal` and so on, for one flat file."""
        return {f"{prefix}.{n}": t.detach().contiguous() for n, t in self.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], prefix: str) -> LinearMap | None:
        """Read the map that `to_tensors` wrote under `prefix`; None where there is none.

        Args:
            tensors: of a whole file; names that do not begin with `prefix.` are left alone.
            prefix: as given to `to_tensors`.

        Raises:
            ValueError: a name under `prefix` that is no tensor of a map, tensors that do not go
                together, or values that are not finite; the message names the key.
        """
        start = f"{prefix}."
        held = {key[len(start) :]: t for key, t in tensors.items() if key.startswith(start)}
        for name, tensor in held.items():
            if name not in SHAPES:
                raise ValueError(
                    f"{start}{name} of shape {tuple(tensor.shape)} is unknown; allowed under "
                    f"{prefix}: {', '.join(SHAPES)}"
                )
        if not held:
            return None
        try:
            read = cls(**held)
        except ValueError as error:
            raise ValueError(f"{start}{error}") from None
        for name, tensor in held.items():
            if not (tensor.abs() <= LARGEST_ENTRY).all():
                raise ValueError(
                    f"{start}{name} of shape {tuple(tensor.shape)} holds values that are not "
                    f"finite; allowed: finite ones, at most {LARGEST_ENTRY:g}. Calibrate anew."
                )
        return read


@dataclass(frozen=True, eq=False)
class SpanMaps:
    """The fitted maps of one span: one a bucket of gaps in noise level, and stream.

    The gap to the anchor, `|sigma - sigma_anchor|`, stands for the number of steps since then, so
    that maps serve other numbers of steps too.

    Args:
        edges: upper ends of the buckets, ascending, above 0, in units of sigma; a gap on an edge
            belongs to the bucket below it.
        image: maps of the image stream, one a bucket; None corrects nothing (`linear` is `reuse`
            then, `linear_taylor` is `taylor`).
        text: maps of the text stream, likewise; all None where the span has no such stream.

    Raises:
        ValueError: edges do not ascend from above 0, are not finite, or there are not as many maps
            as edges.
    """

    edges: tuple[float, ...]
    image: tuple[LinearMap | None, ...]
    text: tuple[LinearMap | None, ...]

    def __post_init__(self) -> None:
        steps = zip((0.0, *self.edges), self.edges, strict=False)
        if not all(low < high < math.inf for low, high in steps):
            raise ValueError(f"edges are {self.edges}; allowed: finite, ascending, above 0")
        for name in ("image", "text"):
            if len(maps := getattr(self, name)) != len(self.edges):
                raise ValueError(
                    f"{name} holds {len(maps)} maps; allowed: {len(self.edges)}, one an edge, None "
                    "for reuse"
                )

    def at(self, gap: float) -> tuple[LinearMap | None, LinearMap | None]:
        """Return the maps of image and text for a gap in noise level.

        Outside of `0 < gap <= edges[-1]`, where nothing was ever fitted, there is no map.
        """
        bucket = bucket_of(self.edges, gap)
        return (None, None) if bucket is None else (self.image[bucket], self.text[bucket])

    def corrected(self, forecast: Streams, moved: Streams, gap: float) -> Streams:
        """Return `forecast` plus the residual's change for `moved`, stream by stream.

        Args:
            forecast: without these maps, `(batch, tokens, dim)` a stream.
            moved: the input's change, same shapes.
            gap: see `at`.
        """
        image, text = self.at(gap)
        hidden, words = forecast.hidden_states, forecast.encoder_hidden_states
        if image is not None:
            hidden = hidden + image.change(moved.hidden_states)
        if words is not None and text is not None and moved.encoder_hidden_states is not None:
            words = words + text.change(moved.encoder_hidden_states)
        return replace(forecast, hidden_states=hidden, encoder_hidden_states=words)

    def change_of_each(self, dx: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
        """Return the residual's change of image tokens that each have a gap of their own.

        Every image map runs on every token, so that nothing waits for the device; 0 where there is
        no map.

        Args:
            dx: the input's change, `(batch, tokens, dim)`.
            gaps: see `at`, float32 `(batch, tokens, 1)`.
        """
        change = torch.zeros_like(dx)
        below = (0.0, *self.edges[:-1])
        for low, high, used in zip(below, self.edges, self.image, strict=True):
            if used is not None:
                change = torch.where((gaps > low) & (gaps <= high), used.change(dx), change)
        return change

    def multiply_adds_of_each(self, inputs: Streams) -> float:
        """Return the cost of `change_of_each`, the mean over the tokens of all streams.

        Args:
            inputs: what enters the span.
        """
        image, text = inputs.hidden_states.shape[1], inputs.encoder_hidden_states
        spent = sum(used.multiply_adds_per_token for used in self.image if used is not None)
        return spent * image / (image + (0 if text is None else text.shape[1]))

    def multiply_adds_per_token(self, inputs: Streams, gap: float) -> float:
        """Return the cost of `corrected`, the mean over the tokens of all streams.

        Args:
            inputs: what enters the span.
            gap: see `at`.
        """
        streams = (inputs.hidden_states, inputs.encoder_hidden_states)
        held = [
            (x.shape[1], used)
            for x, used in zip(streams, self.at(gap), strict=True)
            if x is not None
        ]
        spent = sum(
            tokens * used.multiply_adds_per_token for tokens, used in held if used is not None
        )
        return spent / sum(tokens for tokens, _ in held)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.nbytes() for held in (*self.image, *self.text) if held is not None)


def bucket_of(edges: Sequence[float], gap: float) -> int | None:
    """Return the index of the bucket that a gap in noise level falls into; see `SpanMaps`.

    Example:
        >>> [bucket_of((0.1, 0.3), gap) for gap in (0.0, 0.05, 0.1, 0.2, 0.4)]
        [None, 0, 0, 1, None]
    """
    bucket = bisect_left(edges, gap)
    return None if gap <= 0.0 or bucket == len(edges) else bucket


def online_slope(dx: torch.Tensor, dr: torch.Tensor) -> torch.Tensor:
    r"""Fit one slope a channel on a single pair of steps.

    :math:`a_d = \sum \Delta x_d \Delta r_d / (\sum \Delta x_d^2 + \rho)`, with :math:`\rho` the
    mean of :math:`\sum \Delta x_d^2` over channels times `ONLINE_RIDGE`. Sums run over this rank's
    tokens and the batch, in float32.

    Args:
        dx: change of the input, `(batch, tokens, dim)`.
        dr: change of the residual, same shape.

    Returns:
        `(dim,)`, dtype of `dx`; 0 where the input did not move.
    """
    x, r = dx.float(), dr.float()
    energy = x.square().sum(dim=(0, 1))
    slope = (x * r).sum(dim=(0, 1)) / (energy + ONLINE_RIDGE * energy.mean() + 1e-30)
    return slope.to(dx.dtype)
