"""The magnitude gate (MMEA, arXiv 2511.06696, eqs. 3-8).

A gate sits on one equivariant linear layer y = Linear(x), whose weights stay frozen, and changes the
magnitude of every output channel from the invariants of the layer's input:

| equation | symbol | in the code | shape |
|---|---|---|---|
| all even scalars of x | h0 | `scalars_of(x)` | (..., m0) |
| z = SiLU(W_down h0 + b_down) | z | `bottleneck(x)` | (..., r) |
| g0 = W_0 z + b_0 | g0 | `shift` | (..., k0) |
| g = W_l z + b_l | g | `gain` | (..., k1) |
| y0 <- y0 + g0 | | even scalars of y | (..., k0) |
| y_l <- phi(g) y_l, one factor per multiplicity | | every other channel of y | (..., k1, 2l+1) |

phi is exp(g) or 1 + g. Everything that enters a gate is invariant and every factor is shared by the
2l+1 components of a channel, so the layer stays equivariant under rotations and reflections.

Away from the training data z is unbounded, and exp(g) more so. Once the range of z over the training
set is known (`set_range`), z is left alone inside it, to the last bit, and levels off outside:

    c = clamp(z, low, high),   z <- c + w tanh((z - c) / w),   w = MARGIN (high - low).

tanh(u) = u + O(u^3), so this is twice continuously differentiable, and z never leaves [low - w, high + w].

The paper's ablations are options:

| option | what changes |
|---|---|
| `nonlinearity=False` | z = W_down h0 + b_down |
| `separate_bottlenecks=True` | g0 and g have a W_down, b_down and z each; the second is `gain_down` |
| `shift=False` | no g0; a layer with even scalars alone at its output then carries no gate |
| `gains="order"` | one g per irrep (order and parity) of y, shared by its multiplicities |
| `gains="none"` | no g; a layer without even scalars at its output then carries no gate |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._e3nn import o3
from .fast.arrangement import Stage, stage
from .layer_shape import LayerShape, blocks, is_cue_linear, reason_unreadable

Phi = Literal["exp", "residual"]
Gains = Literal["channel", "order", "none"]

# How far beyond its range z may go, in widths of the range. Largest forces on two atoms at 0.3 A and beyond, over those
# of the bare embedded backbone, worst of eight random draws (gate weights of spread 0.03 / 0.05): 9 / 620 at 0.25,
# 8 / 310 at 0.1, 20 / 11000 at 1, and no bound without saturation. The gains of many layers multiply, so the margin
# alone does not keep very strong gates near the backbone. Adapters trained on aspirin stayed within 3 (short_range.py
# does its part there).
MARGIN = 0.25

# A bottleneck unit that never moved in training would otherwise have a range of width zero.
MIN_RANGE_WIDTH = 1e-3


def reason_not_adaptable(linear: Any) -> str | None:
    """Why nothing can act on the output of the layer `linear`; None if something can."""
    if not linear.internal_weights:
        return "it has no weights of its own"
    if reason := reason_unreadable(linear):
        return reason
    if linear.weight.dim() != 1 and not is_cue_linear(linear):
        return "it maps several features at once (f_in, f_out)"
    if linear.irreps_out.dim == 0:
        return "its output is empty"
    if not linear.weight.numel():
        return "none of its inputs leads to an output, so that it has no weights"
    return None


def reason_not_gatable(linear: Any, *, shift: bool = True, gains: Gains = "channel") -> str | None:
    """Why the layer `linear` cannot carry a gate with these heads; None if it can."""
    if reason := reason_not_adaptable(linear):
        return reason
    shape = LayerShape.of(linear)
    if not _even_scalars(shape.irreps_in):
        return f"its input {shape.irreps_in} has no even scalar (0e) for the gate to see"
    if all(irrep.kind == "none" for irrep in _irreps(shape, shift, gains)):
        return f"its output {linear.irreps_out} has nothing that a gate with shift={shift}, gains={gains!r} acts on"
    return None


def _even_scalars(irreps: o3.Irreps) -> list[slice]:
    """Where the even scalars lie, neighbouring blocks joined."""
    found: list[slice] = []
    for (_, ir), where in zip(irreps, irreps.slices(), strict=True):
        if ir.l != 0 or ir.p != 1 or where.start == where.stop:
            continue
        if found and found[-1].stop == where.start:
            where = slice(found.pop().start, where.stop)
        found.append(where)
    return found


class MagnitudeGate(nn.Module):
    """Gate of one linear layer; the identity at the start when `init_std` is 0.

    Args:
        linear: the gated layer, of one of the classes in `layer_shape`, with weights of its own; the first input of a
            tensor product is x. It is read for its irreps, never changed or kept.
        rank: width r of the bottleneck.
        phi: "exp" or "residual".
        saturate: level z off outside the range given to `set_range`.
        init_std: standard deviation of W_0 at the start.
        nonlinearity, separate_bottlenecks, shift, gains: see the table of ablations above; the defaults are the
            published gate.
        generator: source of the initial values.

    Channels that are not even scalars, odd scalars (0o) among them, take part in the gain: a shift by an
    invariant would break their behaviour under reflection, a factor does not.
    """

    family: ClassVar[str] = "gates"  # first word of its tensors' names in an adapter file
    label: ClassVar[str] = "gate"
    # its layers, and the order l that each acts on
    parts: ClassVar[dict[str, str]] = {"down": "all", "gain_down": ">=1", "shift": "0", "gain": ">=1"}

    z_low: Tensor  # (r,), or (2r,) with separate bottlenecks: of the shift, then of the gains
    z_high: Tensor
    factor_of: Tensor  # (scaled components of y,): output of `gain` that scales each

    def __init__(
        self,
        linear: Any,
        *,
        rank: int,
        phi: Phi = "exp",
        saturate: bool = True,
        init_std: float = 0.0,
        nonlinearity: bool = True,
        separate_bottlenecks: bool = False,
        shift: bool = True,
        gains: Gains = "channel",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if reason := reason_not_gatable(linear, shift=shift, gains=gains):
            raise ValueError(f"this layer cannot be gated: {reason}")
        self.rank, self.phi, self.saturate, self.nonlinearity = rank, phi, saturate, nonlinearity
        shape = LayerShape.of(linear)
        self.scalars = _even_scalars(shape.irreps_in)
        self.blocks = blocks(shape.irreps_in)
        self.scalar_blocks = [i for i, (_, ir) in enumerate(shape.irreps_in.simplify()) if ir.l == 0 and ir.p == 1]
        self.irreps, self.components_first = _irreps(shape, shift, gains), shape.components_first
        first_factors = {irrep.first: irrep.n_factors for irrep in self.irreps if irrep.kind == "gain"}
        self.firsts = list(first_factors)
        self.head_sizes = [*(i.mul for i in self.irreps if i.kind == "shift"), *first_factors.values()]
        self.runs, factor_of = _runs_of(self.irreps, shape.components_first)
        self.widths = {kind: [r.width for r in self.runs if r.kind == kind] for kind in ("shift", "gain")}
        m0 = sum(s.stop - s.start for s in self.scalars)
        k0, k1 = sum(self.widths["shift"]), max(factor_of, default=-1) + 1

        like: dict[str, Any] = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        self.down = _bottleneck(m0, rank, generator, **like)
        self.gain_down = _bottleneck(m0, rank, generator, **like) if separate_bottlenecks and k0 and k1 else None
        self.shift = _linear(rank, k0, **like) if k0 else None
        if self.shift is not None and init_std > 0:
            normal = torch.randn(k0, rank, generator=generator, dtype=torch.float64)
            self.shift.weight.data.copy_(init_std * normal)
        self.gain = _linear(rank, k1, **like) if k1 else None

        self.register_buffer(
            "factor_of", torch.tensor(factor_of, dtype=torch.int64, device=like["device"]), persistent=False
        )
        width = rank if self.gain_down is None else 2 * rank
        self.register_buffer("z_low", torch.full((width,), -torch.inf, **like))
        self.register_buffer("z_high", torch.full((width,), torch.inf, **like))
        self.calibrated = False
        self.recording = False
        self.active = True  # read by whoever applies the gate

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take [low, high], shaped like `z_low`, as the range of z seen in training."""
        with torch.no_grad():
            self.z_low.copy_(low)
            self.z_high.copy_(high)
        # an untouched gate (nothing recorded yet) carries infinite bounds
        self.calibrated = bool(torch.isfinite(self.z_low).all() and torch.isfinite(self.z_high).all())

    def start_recording(self) -> None:
        """Forget the range, leave z unbounded, and take the range of all that passes from now on."""
        self.z_low.fill_(torch.inf)
        self.z_high.fill_(-torch.inf)
        self.calibrated, self.recording = False, True

    def stop_recording(self) -> None:
        """Keep the range recorded since `start_recording`."""
        self.recording = False
        if not bool((self.z_low <= self.z_high).all()):  # nothing passed, or NaN
            self.z_low.fill_(-torch.inf)
            self.z_high.fill_(torch.inf)
        self.set_range(self.z_low.clone(), self.z_high.clone())

    def scalars_of(self, x: Tensor) -> Tensor:
        """h0: (..., irreps_in.dim) -> (..., m0)."""
        parts = [x[..., s] for s in self.scalars]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def bounds(self) -> Bounds:
        """Of z, for `level_off`."""
        return Bounds(self.z_low, self.z_high, MARGIN * self._range_width())

    def level_off(self, z: Tensor, bounds: Bounds | None = None) -> Tensor:
        """z (..., r) as it is inside the range seen in training, and bounded outside (the module's last equation).

        Args:
            z: of the bottleneck.
            bounds: `bounds()` if they are known from before.
        """
        # Inside the range nothing happens, to the last bit, and to ask first is cheaper; a GPU would have to wait.
        ask = z.device.type == "cpu" and stage() is None
        if ask and torch.equal(torch.clamp(z.detach(), self.z_low, self.z_high), z.detach()):
            return z
        return _LevelOff.apply(z, *(self.bounds() if bounds is None else bounds))

    def _range_width(self) -> Tensor:
        return torch.clamp(self.z_high - self.z_low, min=MIN_RANGE_WIDTH)

    def bottleneck(self, x: Tensor) -> Tensor:
        """z of eq. 3 for input features x of shape (..., irreps_in.dim), before it levels off: (..., r).

        With separate bottlenecks that of the shift and that of the gains, one after the other: (..., 2r).
        """
        h0 = self.scalars_of(x)
        z = self.down(h0)
        if self.gain_down is not None:
            z = torch.cat([z, self.gain_down(h0)], dim=-1)
        return F.silu(z) if self.nonlinearity else z

    def excess(self, x: Tensor) -> Tensor:
        """How far z lies outside the training range, in widths of that range: (...,), 0 inside."""
        z = self.bottleneck(x)
        outside = torch.clamp(self.z_low - z, min=0) + torch.clamp(z - self.z_high, min=0)
        return (outside / self._range_width()).amax(dim=-1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate the layer's output.

        Args:
            x: input of the linear layer, (..., irreps_in.dim).
            y: output of the linear layer, (..., irreps_out.dim).
        """
        if now := stage():
            return self.by_irrep(now, x, y, self.packed())
        z = self._bounded(self.bottleneck(x))
        z_shift, z_gain = (z, z) if self.gain_down is None else z.split(self.rank, dim=-1)
        # Few large operations: a gate's time on a small molecule is their number. `split` has a cheap gradient.
        shifts = iter(() if self.shift is None else self.shift(z_shift).split(self.widths["shift"], dim=-1))  # eq. 4
        gains: Iterator[Tensor] = iter(())
        if self.gain is not None:
            factors = self._phi(self.gain(z_gain)).index_select(-1, self.factor_of)
            gains = iter(factors.split(self.widths["gain"], dim=-1))
        parts = []
        for run, piece in zip(self.runs, y.split([run.width for run in self.runs], dim=-1), strict=True):
            if run.kind == "shift":
                piece = piece + next(shifts)  # eq. 7
            elif run.kind == "gain":
                piece = piece * next(gains)  # eq. 8
            parts.append(piece)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _phi(self, g: Tensor) -> Tensor:
        return torch.exp(g) if self.phi == "exp" else 1 + g  # eqs. 5, 6

    def _bounded(self, z: Tensor, bounds: Bounds | None = None) -> Tensor:
        """z as the heads see it; its range is recorded where that is asked for."""
        if self.recording:
            flat = z.detach().reshape(-1, z.shape[-1])
            if flat.shape[0]:
                self.z_low.copy_(torch.minimum(self.z_low, flat.amin(0)))
                self.z_high.copy_(torch.maximum(self.z_high, flat.amax(0)))
        elif self.saturate and self.calibrated:
            return self.level_off(z, bounds)
        return z

    def packed(self) -> Packed:
        """All weights as two layers."""
        down, heads = [self.down], [head for head in (self.shift, self.gain) if head is not None]
        weights = [head.weight for head in heads]
        if self.gain_down is not None:  # then there are two heads, and each sees a bottleneck of its own
            down.append(self.gain_down)
            weights = [F.pad(weights[0], (0, self.rank)), F.pad(weights[1], (self.rank, 0))]
        return Packed(
            _stacked([layer.weight for layer in down]),
            _stacked([layer.bias for layer in down]),
            _stacked(weights),
            _stacked([head.bias for head in heads]),
        )

    def by_irrep(self, now: Stage, x: Tensor, y: Tensor, layers: Layers) -> Tensor:
        """`forward` for a compiled network, where operations cost nothing and large pieces do: irrep by irrep."""
        pieces = now.split(x, self.blocks)
        h0 = _stacked([pieces[i].flatten(-2) for i in self.scalar_blocks], dim=-1)
        z = layers.bottleneck(h0)
        z = self._bounded(F.silu(z) if self.nonlinearity else z, layers.bounds())
        heads = iter(layers.parts(z, self.head_sizes))
        shifts = [next(heads) for irrep in self.irreps if irrep.kind == "shift"]
        gains = {first: self._phi(next(heads)) for first in self.firsts}
        found = []
        for irrep, piece in zip(self.irreps, self._pieces(now, y), strict=True):  # (..., 2l+1, channels)
            if irrep.kind == "shift":
                piece = piece + shifts.pop(0).unsqueeze(-2)
            elif irrep.kind == "gain":
                piece = piece * gains[irrep.first].unsqueeze(-2)
            found.append(piece)
        return torch.cat([piece.flatten(-2) for piece in found], dim=-1) if self.components_first else now.join(found)

    def _pieces(self, now: Stage, y: Tensor) -> Sequence[Tensor]:
        """The irreps of y, (..., 2l+1, channels) each."""
        if not self.components_first:
            return now.split(y, tuple((i.mul, i.dim) for i in self.irreps))
        parts = y.split([i.mul * i.dim for i in self.irreps], dim=-1)
        return [part.unflatten(-1, (i.dim, i.mul)) for part, i in zip(parts, self.irreps, strict=True)]

    def extra_repr(self) -> str:
        settings = f"rank={self.rank}, phi={self.phi}, nonlinearity={self.nonlinearity}"
        return f"{settings}, saturate={self.saturate}, calibrated={self.calibrated}"


class Bounds(NamedTuple):
    """Where z levels off: low, high and w of the module's last equation, each (width of z,)."""

    low: Tensor
    high: Tensor
    w: Tensor


class Layers(Protocol):
    """The weights of a gate as two layers: h0 -> z and z -> (g0, g)."""

    def bounds(self) -> Bounds | None:
        """Of z; None: the gate's own."""

    def bottleneck(self, h0: Tensor) -> Tensor:
        """(..., m0) -> (..., width of z), before it is bent."""

    def parts(self, z: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """(..., width of z) -> g0 and g, in parts of these sizes."""


class _LevelOff(torch.autograd.Function):
    """The last equation of this module. Its derivative is 1 - tanh((z - c) / w)^2, inside the range and outside.

    torch's own would keep the hyperbolic tangent, and a compiler would then make the rest of this anew for every output
    of the heads.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, low: Tensor, high: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(z, low, high, w)
        c = torch.clamp(z, low, high)
        return c + w * torch.tanh((z - c) / w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        z, low, high, w = ctx.saved_tensors
        t = torch.tanh((z - torch.clamp(z, low, high)) / w)
        return grad * (1 - t * t), None, None, None


class Packed(NamedTuple):
    """`Layers` as plain products.

    Attributes:
        down, down_bias: (width of z, m0), (width of z,).
        heads, heads_bias: (k0 + k1, width of z), (k0 + k1,).
    """

    down: Tensor
    down_bias: Tensor
    heads: Tensor
    heads_bias: Tensor

    def bounds(self) -> None:
        return None

    def bottleneck(self, h0: Tensor) -> Tensor:
        return F.linear(h0, self.down, self.down_bias)

    def parts(self, z: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        return F.linear(z, self.heads, self.heads_bias).split(list(sizes), dim=-1)


def _stacked(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


@dataclass(frozen=True)
class _Run:
    """Neighbouring components of y that are shifted, scaled or left alone."""

    kind: Literal["shift", "gain", "none"]
    width: int


@dataclass(frozen=True)
class _Irrep:
    """What is done to one irrep of y.

    Attributes:
        kind: whether it is shifted, scaled or left alone.
        mul, dim: its channels, and the components of each.
        first: the output of the gain head that is the factor of its first channel.
        n_factors: how many follow: one for each channel, or one for all.
    """

    kind: Literal["shift", "gain", "none"]
    mul: int
    dim: int
    first: int = 0
    n_factors: int = 0


def _irreps(shape: LayerShape, shift: bool, gains: Gains) -> list[_Irrep]:
    """The irreps of y; a factor is shared by the components of a channel, and by equal irreps if gains is "order"."""
    found: list[_Irrep] = []
    of_irrep: dict[o3.Irrep, int] = {}
    n_factors = 0
    for mul, ir in shape.irreps_out:
        if mul == 0:
            continue
        if ir.l == 0 and ir.p == 1:
            found.append(_Irrep("shift" if shift else "none", mul, ir.dim))
        elif gains == "none":
            found.append(_Irrep("none", mul, ir.dim))
        else:
            n = 1 if gains == "order" else mul
            first = of_irrep.setdefault(ir, n_factors) if gains == "order" else n_factors
            n_factors = max(n_factors, first + n)
            found.append(_Irrep("gain", mul, ir.dim, first, n))
    return found


def _runs_of(irreps: list[_Irrep], components_first: bool) -> tuple[list[_Run], list[int]]:
    """The runs of y, and for every scaled component, in their order, the output of the gain head that is its factor."""
    runs: list[_Run] = []
    factor_of: list[int] = []
    for irrep in irreps:
        if irrep.kind == "gain":
            one_each = [irrep.first + (channel if irrep.n_factors > 1 else 0) for channel in range(irrep.mul)]
            factor_of += one_each * irrep.dim if components_first else [f for f in one_each for _ in range(irrep.dim)]
        width = irrep.mul * irrep.dim
        if runs and runs[-1].kind == irrep.kind:
            width += runs.pop().width
        runs.append(_Run(irrep.kind, width))
    return runs, factor_of


def _bottleneck(
    n_in: int, rank: int, generator: torch.Generator | None, *, dtype: torch.dtype, device: torch.device
) -> nn.Linear:
    """A linear layer with torch's default weights, drawn from our own generator, and no bias yet."""
    layer = _linear(n_in, rank, dtype=dtype, device=device)
    bound = n_in**-0.5
    uniform = torch.rand(rank, n_in, generator=generator, dtype=torch.float64) * (2 * bound) - bound
    layer.weight.data.copy_(uniform)
    return layer


def _linear(n_in: int, n_out: int, *, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """A linear layer of zeros, made without touching torch's global random state."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=dtype, device=device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
