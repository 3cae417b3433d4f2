"""How trained tensors are optimised: an optimiser with the groups that an adapter asks for, and averaged weights.

| `TrainConfig.optimizer` | steps | averaged weights |
|---|---|---|
| "soap" | Adam in the eigenbasis of Shampoo (SOAP, arXiv 2409.11321) | exponential moving averages, `ema_decay` |
| "adamw" | AdamW | the same |
| "schedulefree" | schedule-free AdamW (arXiv 2405.15682) | its own |

Averaged weights are what is validated and kept; both know nothing of each other's ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..errors import CheckpointError, TrainingError
from ..fast.recorded_change import RecordedChange
from ..updates import ParameterGroup
from .soap import SOAP


class Averages:
    """Exponential moving averages of parameters; the memory is short at first: min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters: list[Tensor] = list(parameters)
        self._values = [p.detach().clone() for p in self.parameters]
        self.updates = 0

    def share(self) -> float:
        """What the parameters count for in the next update, which is hereby counted."""
        self.updates += 1
        return 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, share: float | Tensor) -> None:
        """After a step of the optimiser; the share may be a tensor without dimensions."""
        now = [p.detach() for p in self.parameters]
        if isinstance(share, Tensor):  # for which there is no single operation on lists
            apart = torch._foreach_sub(now, self._values)
            torch._foreach_mul_(apart, share)
            torch._foreach_add_(self._values, apart)
        else:
            torch._foreach_lerp_(self._values, now, share)

    def changed(self) -> list[Tensor]:
        """What `update` changes."""
        return self._values

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters have their averaged values."""
        with _kept(self.parameters):
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self._values)
            yield

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._values, state["values"])
        self.updates = state["updates"]


class ScheduleFreeAverages:
    """The averages that a schedule-free optimiser keeps: x, where the parameters themselves are y, beyond x.

    Args:
        optimizer: in its training mode, in which it is left.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: Any) -> None:
        self.parameters, self.optimizer = list(parameters), optimizer

    def share(self) -> float:
        return 0.0

    def update(self, share: float | Tensor) -> None:
        """The optimiser's own steps do it."""

    def changed(self) -> list[Tensor]:
        return []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters have their averaged values."""
        # From x back to y the optimiser is not exact to the last bit, and a run that validates more often than
        # another would go elsewhere.
        with _kept(self.parameters):
            self.optimizer.eval()
            try:
                yield
            finally:
                self.optimizer.train()

    def state_dict(self) -> dict[str, Any]:
        return {}  # in the optimiser's

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Optimiser:
    """Steps of all trained tensors.

    Args:
        parameters: all of them, in the order of everything that is kept.
        groups: the same, by how they are optimised.
        config: learning rates, decays, and which optimiser.
        recorded: record the steps of SOAP (`recorded_change`); None: on a GPU.

    Attributes:
        torch: the optimiser at work, for learning rate schedulers.

    Raises:
        TrainingError: settings that do not go together.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        groups: Sequence[ParameterGroup],
        config: TrainConfig,
        *,
        recorded: bool | None = None,
    ) -> None:
        check_optimiser(config)
        self.parameters, self.groups = list(parameters), list(groups)
        self._decays = [config.tau_weight_decay if g.rates == "thresholds" else config.weight_decay for g in groups]
        settings: list[dict[str, Any]] = []
        for group, decay in zip(groups, self._decays, strict=True):
            ratio = config.tau_lr / config.lr if group.rates == "thresholds" and config.tau_lr is not None else 1.0
            # `step` itself decays the groups with masks
            decay = decay if group.decaying is None else 0.0
            settings.append(dict(params=group.parameters, lr=config.lr * ratio, lr_ratio=ratio, weight_decay=decay))
            if config.optimizer == "soap":
                settings[-1]["shapes"] = [list(shapes) for shapes in group.all_shapes()]
        self.torch: Any
        self._averages: Averages | ScheduleFreeAverages
        if config.optimizer == "schedulefree":
            import schedulefree

            self.torch = schedulefree.AdamWScheduleFree(settings, lr=config.lr)
            self.torch.train()
            self._averages = ScheduleFreeAverages(self.parameters, self.torch)
        else:
            soap = config.optimizer == "soap"
            self.torch = SOAP(settings, lr=config.lr) if soap else _adamw(settings, config)
            self._averages = Averages(self.parameters, config.ema_decay)
        self._recorded: RecordedChange | None = None
        if isinstance(self.torch, SOAP) and (
            self.parameters[0].device.type == "cuda" if recorded is None else recorded
        ):
            self._recorded = RecordedChange(self._change)

    @property
    def lr(self) -> float:
        """Learning rate of the weights; groups with a rate of their own follow in proportion."""
        group = self.torch.param_groups[0]
        return group["lr"] / group["lr_ratio"]

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.torch.param_groups:
            group["lr"] = value * group["lr_ratio"]

    def step(self) -> None:
        """One step with the gradients that are there. Recorded on a GPU, for SOAP, but for its new bases."""
        gradients = {p: p.grad for p in self.parameters if p.grad is not None}
        if not isinstance(self.torch, SOAP):
            self._change(gradients, self._numbers())
            return
        self.torch.begin()
        numbers, layout = self._numbers(), (*self.torch.layout(), *map(Tensor.data_ptr, self.parameters))
        if self._recorded is None or not self._recorded(gradients, numbers, layout, self._changed):
            self._change(gradients, numbers)
        self.torch.end()

    def _numbers(self) -> list[float]:
        """What differs from step to step: the decay of every group, the share of averages, the optimiser's own."""
        decays = [used["lr"] * decay for decay, used in zip(self._decays, self.torch.param_groups, strict=True)]
        own = self.torch.numbers() if isinstance(self.torch, SOAP) else []
        return [*decays, self._averages.share(), *own]

    def _change(self, gradients: Mapping[Tensor, Tensor], numbers: Sequence[float | Tensor]) -> None:
        """All that every step does; numbers may be tensors for SOAP."""
        n = len(self.groups)
        self._decay_masked(gradients, numbers[:n])
        if isinstance(self.torch, SOAP):
            self.torch.change(gradients, numbers[n + 1 :])
        else:
            self.torch.step()
        self._averages.update(numbers[n])

    def _changed(self) -> list[Tensor]:
        """All that `_change` changes, for SOAP."""
        return [*self.torch.changed(), *self._averages.changed()]

    def close(self) -> None:
        """Give the memory of a recording back; another step is another beginning."""
        if self._recorded is not None:
            self._recorded.close()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the parameters have their averaged values."""
        with self._averages.applied():
            yield

    def averages(self) -> list[Tensor]:
        """Copies of the averaged values, in the order of `parameters`."""
        with self.averaged():
            return [p.detach().clone() for p in self.parameters]

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters, for a checkpoint."""
        return {"torch": self.torch.state_dict(), "averages": self._averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Raises CheckpointError for that of another optimiser."""
        try:
            self.torch.load_state_dict(state["torch"])
        except (ValueError, KeyError) as problem:
            raise CheckpointError(
                f"the checkpoint holds the state of another optimiser ({problem}), perhaps of an older version "
                "of mmea: start without --resume"
            ) from problem
        self._averages.load_state_dict(state["averages"])

    @torch.no_grad()
    def _decay_masked(self, gradients: Mapping[Tensor, Tensor], shares: Sequence[float | Tensor]) -> None:
        """Decoupled weight decay, w <- w - share w with share = lr decay, of the entries that a group names.

        A schedule-free optimiser steps in z and looks at y = (1 - beta) z + beta x. With this share for each, the
        outcome is that of its own weight decay, and x is left to its average.
        """
        of_groups = zip(self.groups, self._decays, shares, self.torch.param_groups, strict=True)
        for group, decay, share, used in of_groups:
            if group.decaying is None or decay == 0:
                continue
            for parameter, mask in zip(group.parameters, group.decaying, strict=True):
                if parameter not in gradients:
                    continue
                change = share * parameter * mask()
                z = self.torch.state[parameter].get("z")
                if z is None:
                    parameter.sub_(change)
                else:
                    z.sub_(change)
                    parameter.sub_((1 - used["betas"][0]) * change)


def _adamw(settings: list[dict[str, Any]], config: TrainConfig) -> Any:
    return torch.optim.AdamW(settings, lr=config.lr, amsgrad=config.amsgrad)


def check_optimiser(config: TrainConfig) -> None:
    """Raise a TrainingError for settings that do not go together."""
    if config.optimizer not in ("soap", "adamw", "schedulefree"):
        raise TrainingError(f"optimizer must be 'soap', 'adamw' or 'schedulefree', got {config.optimizer!r}")
    if config.optimizer == "schedulefree":
        given = {"schedule": config.schedule, "ema_decay": config.ema_decay, "stage_two_start": config.stage_two_start}
        needed = {"schedule": "constant", "ema_decay": 0.0, "stage_two_start": None}
        if wrong := [f"{k} is {given[k]!r}, expected {v!r}" for k, v in needed.items() if given[k] != v]:
            raise TrainingError(f"a schedule-free optimizer has no schedule and averages by itself: {'; '.join(wrong)}")
    for name in ("weight_decay", "tau_weight_decay"):
        if not getattr(config, name) >= 0:
            raise TrainingError(f"{name} must not be negative, got {getattr(config, name)}")
    if config.tau_lr is not None and not config.tau_lr > 0:
        raise TrainingError(f"tau_lr must be positive, got {config.tau_lr}")


@contextmanager
def _kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """After this context the parameters have the values of before, to the bit."""
    before = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), before)
