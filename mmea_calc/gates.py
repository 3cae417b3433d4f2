"""The magnitude gate (MMEA, arXiv 2511.06696, eqs. 3-8).

A gate sits on one equivariant linear layer y = Linear(x), whose weights stay frozen, and changes the
magnitude of every output channel from the invariants of the layer's input:

| equation | symbol | in the code | shape |
|---|---|---|---|
| all even scalars of x | h0 | `_scalars(x)` | (..., m0) |
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
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._e3nn import o3

Phi = Literal["exp", "residual"]

# How far beyond its range z may go, in widths of the range. Largest forces on two atoms at 0.3 A and beyond, over those
# of the bare embedded backbone, worst of eight random draws (gate weights of spread 0.03 / 0.05): 9 / 620 at 0.25,
# 8 / 310 at 0.1, 20 / 11000 at 1, and no bound without saturation. The gains of many layers multiply, so the margin
# alone does not keep very strong gates near the backbone. Adapters trained on aspirin stayed within 3 (short_range.py
# does its part there).
MARGIN = 0.25

# A bottleneck unit that never moved in training would otherwise have a range of width zero.
MIN_RANGE_WIDTH = 1e-3


def reason_not_gatable(linear: Any) -> str | None:
    """Why the `o3.Linear` layer `linear` cannot carry a gate; None if it can."""
    if not linear.internal_weights:
        return "it has no weights of its own"
    if linear.weight.dim() != 1:
        return "it maps several features at once (f_in, f_out)"
    if not _even_scalars(linear.irreps_in):
        return f"its input {linear.irreps_in} has no even scalar (0e) for the gate to see"
    if linear.irreps_out.dim == 0:
        return "its output is empty"
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
    """Gate of one `o3.Linear`; the identity at the start when `init_std` is 0.

    Args:
        linear: the gated `o3.Linear`; it is read for its irreps, never changed or kept.
        rank: width r of the bottleneck.
        phi: "exp" or "residual".
        saturate: level z off outside the range given to `set_range`.
        init_std: standard deviation of W_0 at the start.
        generator: source of the initial values.

    Channels that are not even scalars, odd scalars (0o) among them, take part in the gain: a shift by an
    invariant would break their behaviour under reflection, a factor does not.
    """

    z_low: Tensor
    z_high: Tensor

    def __init__(
        self,
        linear: Any,
        *,
        rank: int,
        phi: Phi = "exp",
        saturate: bool = True,
        init_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if reason := reason_not_gatable(linear):
            raise ValueError(f"this layer cannot be gated: {reason}")
        self.rank, self.phi, self.saturate = rank, phi, saturate
        self.scalars = _even_scalars(linear.irreps_in)
        self.blocks = _output_blocks(linear.irreps_out)
        m0 = sum(s.stop - s.start for s in self.scalars)
        k0 = sum(b.channels for b in self.blocks if b.shifted)
        k1 = sum(b.channels for b in self.blocks if not b.shifted)

        like: dict[str, Any] = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        self.down = _linear(m0, rank, **like)
        # torch's default for a Linear layer, drawn from our own generator
        bound = m0**-0.5
        uniform = torch.rand(rank, m0, generator=generator, dtype=torch.float64) * (2 * bound) - bound
        self.down.weight.data.copy_(uniform)
        self.shift = _linear(rank, k0, **like) if k0 else None
        if self.shift is not None and init_std > 0:
            normal = torch.randn(k0, rank, generator=generator, dtype=torch.float64)
            self.shift.weight.data.copy_(init_std * normal)
        self.gain = _linear(rank, k1, **like) if k1 else None

        self.register_buffer("z_low", torch.full((rank,), -torch.inf, **like))
        self.register_buffer("z_high", torch.full((rank,), torch.inf, **like))
        self.calibrated = False
        self.recording = False
        self.active = True  # read by whoever applies the gate

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take [low, high], shape (r,) each, as the range of z seen in training."""
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

    def _scalars(self, x: Tensor) -> Tensor:
        parts = [x[..., s] for s in self.scalars]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _level_off(self, z: Tensor) -> Tensor:
        c = torch.clamp(z, self.z_low, self.z_high)
        w = MARGIN * self._range_width()
        return c + w * torch.tanh((z - c) / w)

    def _range_width(self) -> Tensor:
        return torch.clamp(self.z_high - self.z_low, min=MIN_RANGE_WIDTH)

    def bottleneck(self, x: Tensor) -> Tensor:
        """z of eq. 3 for input features x of shape (..., irreps_in.dim), before it levels off: (..., r)."""
        return F.silu(self.down(self._scalars(x)))

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
        z = self.bottleneck(x)
        if self.recording:
            flat = z.detach().reshape(-1, self.rank)
            if flat.shape[0]:
                self.z_low.copy_(torch.minimum(self.z_low, flat.amin(0)))
                self.z_high.copy_(torch.maximum(self.z_high, flat.amax(0)))
        elif self.saturate and self.calibrated:
            z = self._level_off(z)
        shift = self.shift(z) if self.shift is not None else None  # eq. 4
        gain = None
        if self.gain is not None:  # eqs. 5, 6
            g = self.gain(z)
            gain = torch.exp(g) if self.phi == "exp" else 1 + g
        parts = []
        for block in self.blocks:
            piece = y[..., block.where]
            if block.shifted:
                assert shift is not None
                parts.append(piece + shift[..., block.heads])  # eq. 7
            else:
                assert gain is not None
                channels = piece.unflatten(-1, (block.channels, block.components))
                parts.append((channels * gain[..., block.heads].unsqueeze(-1)).flatten(-2))  # eq. 8
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, phi={self.phi}, saturate={self.saturate}, calibrated={self.calibrated}"


class _Block:
    """A run of output channels: where it lies in y, and which outputs of the shift or gain head drive it."""

    def __init__(self, where: slice, heads: slice, channels: int, components: int, shifted: bool) -> None:
        self.where, self.heads = where, heads
        self.channels, self.components, self.shifted = channels, components, shifted


def _output_blocks(irreps: o3.Irreps) -> list[_Block]:
    blocks: list[_Block] = []
    used = {True: 0, False: 0}
    for (mul, ir), where in zip(irreps, irreps.slices(), strict=True):
        if mul == 0:
            continue
        shifted = ir.l == 0 and ir.p == 1
        heads = slice(used[shifted], used[shifted] + mul)
        used[shifted] += mul
        blocks.append(_Block(where, heads, mul, ir.dim, shifted))
    return blocks


def _linear(n_in: int, n_out: int, *, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """A linear layer of zeros, made without touching torch's global random state."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=dtype, device=device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
