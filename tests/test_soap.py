"""SOAP: the steps of its paper, whatever is stacked with what, and to the bit what a resumed run takes."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from waiting import Nothing, watched_recording

from mmea_calc.adapted import attach
from mmea_calc.backbone import load_backbone
from mmea_calc.config import AdapterConfig, TrainConfig
from mmea_calc.errors import TrainingError
from mmea_calc.fast.recorded import Recording
from mmea_calc.training import soap
from mmea_calc.training.optimiser import Optimiser
from mmea_calc.training.soap import FREQUENCY, SOAP
from mmea_calc.updates import ParameterGroup

# Squares, wide and high matrices, more axes, vectors, and two that a stack shares.
SHAPES = ((5, 5), (5, 5), (3, 6), (6, 3), (2, 3, 4), (7,), (1,), (4, 1))


def draw(shapes: Any = SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(optimiser: Any, parameters: list[nn.Parameter], first: int, last: int, shapes: Any = SHAPES) -> None:
    for step in range(first, last):
        for p, gradient in zip(parameters, draw(shapes, 100 + step), strict=True):
            p.grad = gradient
        optimiser.step()


def one_by_one(values: list[Tensor], steps: int, *, lr: float, decay: float, beta: float = 0.95) -> list[Tensor]:
    """Algorithm 3 of arXiv 2409.11321, each tensor alone, its moments in the basis of the time."""
    found = []
    for i, value in enumerate(values):
        axes = range(value.dim() if value.dim() > 1 else 0)

        def turned(x: Tensor, matrices: list[Tensor]) -> Tensor:
            for k, matrix in enumerate(matrices):
                x = torch.tensordot(x, matrix, ([k], [0])).movedim(-1, k)
            return x

        p, m, v = value.clone(), torch.zeros_like(value), torch.zeros_like(value)
        products, bases = [torch.zeros(value.shape[k], value.shape[k]).double() for k in axes], list[Tensor]()
        for t in range(steps):
            g = draw(seed=100 + t)[i]
            if t:
                seen = turned(g, bases)
                m, v = beta * m + (1 - beta) * g, beta * v + (1 - beta) * seen**2
                change = turned(turned(m, bases) / (v.sqrt() + 1e-8), [q.T for q in bases])
                p = (p - lr * (1 - beta**t) ** 0.5 / (1 - beta**t) * change) * (1 - lr * decay)
            for k in axes:
                others = [j for j in axes if j != k]
                products[k] = beta * products[k] + (1 - beta) * torch.tensordot(g, g, (others, others))
            if t == 0:
                bases = [torch.linalg.eigh(c)[1].flip(-1) for c in products]
            elif t % FREQUENCY == 0:
                for k in axes:
                    ahead = products[k] @ bases[k]
                    order = (bases[k] * ahead).sum(0).argsort(descending=True)
                    v = v.index_select(k, order)
                    bases[k] = torch.linalg.qr(ahead[:, order])[0]
        found.append(p)
    return found


def test_its_steps_are_those_of_the_paper() -> None:
    # (3, 6) and the like have products without full rank in the first steps, where any basis of what is left will do:
    # those with one are compared.
    full = [i for i, shape in enumerate(SHAPES) if len(shape) != 2 or shape[0] == shape[1]]
    parameters = [nn.Parameter(x) for x in draw()]
    optimiser = SOAP(parameters, 0.05, weight_decay=0.1)
    run(optimiser, parameters, 0, 3 * FREQUENCY + 2)
    expected = one_by_one(draw(), 3 * FREQUENCY + 2, lr=0.05, decay=0.1)
    for i in full:
        assert float((parameters[i].detach() - draw()[i]).abs().max()) > 0.02
        torch.testing.assert_close(parameters[i].detach(), expected[i], rtol=1e-9, atol=1e-9)


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw([(n, n)], seed)[0])[0]


def test_turning_rows_and_columns_turns_the_steps() -> None:
    """What Adam lacks: it does not matter in which basis a weight is written down."""
    left, right = rotation(5, 1), rotation(4, 2)
    one, other = nn.Parameter(draw([(5, 4)])[0]), nn.Parameter(left @ draw([(5, 4)])[0] @ right)
    optimisers = [SOAP([one], 0.05), SOAP([other], 0.05)]
    for step in range(2 * FREQUENCY + 3):
        # A mean over twenty gradients: the products have full rank from the first step on.
        g = draw([(5, 4)], step)[0] * torch.tensor([[3.0, 1.0, 2.0, 0.5]]) + 5 * draw([(5, 4)], 77)[0]
        one.grad, other.grad = g, left @ g @ right
        for optimiser in optimisers:
            optimiser.step()
    assert float((one.detach() - draw([(5, 4)])[0]).abs().max()) > 0.3
    torch.testing.assert_close(other, left @ one @ right, rtol=1e-7, atol=1e-7)


def test_a_matrix_and_its_transpose_take_the_same_steps() -> None:
    wide = [nn.Parameter(x) for x in draw([(3, 6), (2, 8)])]
    high = [nn.Parameter(x.T.contiguous()) for x in draw([(3, 6), (2, 8)])]
    for parameters in (wide, high):
        optimiser = SOAP(parameters, 0.05)
        for step in range(FREQUENCY + 5):
            for p, g in zip(parameters, draw([(3, 6), (2, 8)], 100 + step), strict=True):
                p.grad = g if p.shape[0] < p.shape[1] else g.T
            optimiser.step()
    for one, other in zip(wide, high, strict=True):
        assert torch.equal(one, other.T)


def test_parts_of_a_tensor_are_matrices_of_their_own() -> None:
    """A flat tensor with shapes takes the steps of these matrices one by one."""
    shapes = [(4, 4), (2, 3, 5), (3, 3)]
    flat = nn.Parameter(torch.cat([x.flatten() for x in draw(shapes)]))
    apart = [nn.Parameter(x) for x in draw(shapes)]
    optimisers = [SOAP([dict(params=[flat], shapes=[shapes])], 0.05), SOAP(apart, 0.05)]
    for step in range(FREQUENCY + 5):
        gradients = draw(shapes, 100 + step)
        flat.grad = torch.cat([g.flatten() for g in gradients])
        for p, g in zip(apart, gradients, strict=True):
            p.grad = g
        for optimiser in optimisers:
            optimiser.step()
    torch.testing.assert_close(flat, torch.cat([p.flatten() for p in apart]), rtol=1e-10, atol=1e-12)
    wrong = SOAP([dict(params=[flat], shapes=[[(7, 7)]])], 0.05)
    with pytest.raises(ValueError, match="do not fill a tensor of 55 values"):
        wrong.step()


def test_bases_are_found_where_single_precision_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LAPACK does for a first gradient that is zero but for a few rows."""
    eigh, gradient = torch.linalg.eigh, draw([(6, 4)])[0].float()

    def failing(matrices: Tensor) -> Any:
        if matrices.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    p = nn.Parameter(torch.zeros(6, 4))
    p.grad = gradient
    optimiser = SOAP([p], 0.05)
    optimiser.step()
    for k, basis in enumerate(optimiser.state[p]["blocks"][0]["bases"]):
        assert basis.dtype == torch.float32
        product = gradient @ gradient.T if k == 0 else gradient.T @ gradient
        turned = basis.T @ product @ basis
        torch.testing.assert_close(turned, turned.diagonal().sort(descending=True)[0].diag(), rtol=0, atol=1e-5)


def test_a_tensor_without_a_gradient_waits_and_the_others_do_not_notice() -> None:
    shapes = [(5, 5), (5, 5), (3,)]
    both, alone = [[nn.Parameter(x) for x in draw(shapes)] for _ in range(2)]
    one, other = SOAP(both, 0.05), SOAP(alone, 0.05)
    for step in range(2 * FREQUENCY):
        for k, g in enumerate(draw(shapes, 100 + step)):
            both[k].grad, alone[k].grad = (None if k == 1 and step % 3 == 0 else g), (None if k == 1 else g)
        one.step()
        other.step()
    for k in (0, 2):
        torch.testing.assert_close(both[k], alone[k], rtol=1e-12, atol=1e-12)
    assert torch.equal(alone[1], draw(shapes)[1])
    assert float((both[1] - alone[1]).detach().abs().max()) > 0.3


def test_an_axis_that_is_too_long_has_no_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along it the steps are Adam's: each row of a long matrix by itself, in the basis of the columns."""
    monkeypatch.setattr(soap, "LARGEST", 6)
    long = nn.Parameter(draw([(8, 5)])[0])
    optimiser = SOAP([long], 0.05)
    state = optimiser.state[long]
    run(optimiser, [long], 0, FREQUENCY + 5, [(8, 5)])
    assert [None if b is None else tuple(b.shape) for b in state["blocks"][0]["bases"]] == [None, (5, 5)]
    turn = rotation(5, 3)
    other = nn.Parameter(draw([(8, 5)])[0] @ turn)
    second = SOAP([other], 0.05)
    for step in range(FREQUENCY + 5):
        other.grad = draw([(8, 5)], 100 + step)[0] @ turn
        second.step()
    torch.testing.assert_close(other, long @ turn, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("stop", [1, 7, FREQUENCY, 2 * FREQUENCY + 1])
def test_a_resumed_run_takes_the_same_steps_to_the_bit(stop: int) -> None:
    whole, parts = [[nn.Parameter(x) for x in draw()] for _ in range(2)]
    run(SOAP(whole, 0.05, weight_decay=0.1), whole, 0, 25)
    first = SOAP(parts, 0.05, weight_decay=0.1)
    run(first, parts, 0, stop)
    kept = io.BytesIO()
    torch.save(first.state_dict(), kept)
    again = SOAP(parts, 0.3)
    again.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
    run(again, parts, stop, 25)
    assert all(map(torch.equal, whole, parts))


def test_a_state_that_is_not_its_own_is_refused_before_anything_changes() -> None:
    parameters = [nn.Parameter(x) for x in draw()]
    config = TrainConfig(optimizer="soap")
    groups = [ParameterGroup(parameters)]
    ours = Optimiser(parameters, groups, config)
    theirs = Optimiser(parameters, groups, TrainConfig(optimizer="adamw"))
    for optimiser in (ours, theirs):
        run(optimiser, parameters, 0, 3)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(TrainingError, match=r"state of another optimiser.*without --resume"):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict()["torch"]["state"], before["torch"]["state"], rtol=0, atol=0)


def test_flat_weights_of_linear_layers_are_matrices_to_it() -> None:
    """All weights of a backbone, as a pretraining takes them: e3nn keeps those of a layer in one vector."""
    network = load_backbone("mmea-organic-s", device="cpu").network
    handle = attach(network, AdapterConfig(method="full"))
    (group,) = handle.parameter_groups()
    matrices = vectors = 0
    for p, shapes in zip(group.parameters, group.all_shapes(), strict=True):
        assert sum(torch.Size(s).numel() for s in shapes) == p.numel()
        matrices += p.numel() if len(shapes[0]) > 1 else 0
        vectors += p.numel() if len(shapes[0]) == 1 else 0
    assert (matrices, vectors) == (325_328, 8)  # those of the radial basis
    # two blocks of 64 x 64 of the last products' linear layers among them
    assert ((64, 64), (64, 64)) in group.all_shapes()
    assert ((64, 10, 64),) in group.all_shapes()  # channels, elements, channels


def test_long_axes_have_a_new_basis_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soap, "LONG", 5)
    parameters = [nn.Parameter(x) for x in draw([(6, 6), (5, 5)])]
    optimiser = SOAP(parameters, 0.05)
    seen: list[list[Tensor]] = [[], []]
    for step in range(soap.RARELY + 1):
        run(optimiser, parameters, step, step + 1, [(6, 6), (5, 5)])
        for k, p in enumerate(parameters):
            basis = optimiser.state[p]["blocks"][0]["bases"][0]
            if not seen[k] or not torch.equal(basis, seen[k][-1]):
                seen[k].append(basis.clone())
    assert [len(bases) for bases in seen] == [2, 6]


# -- recorded --------------------------------------------------------------------------------------------------------

CONFIG = TrainConfig(optimizer="soap", lr=0.05, weight_decay=0.1, tau_lr=0.02, tau_weight_decay=0.2, ema_decay=0.9)


def positive(p: nn.Parameter) -> Tensor:
    return p.detach() > 0


def pair_of(config: TrainConfig = CONFIG, device: str = "cpu") -> tuple[list[Optimiser], list[list[nn.Parameter]]]:
    """Two optimisers of the same parameters, the second one recorded: rates of two kinds, and entries that decay."""
    optimisers, parameters = [], []
    for recorded in (False, True):
        own = [nn.Parameter(x.to(device)) for x in draw()]
        masked = ParameterGroup(own[:2], decaying=tuple(partial(positive, p) for p in own[:2]))
        optimisers.append(Optimiser(own, [masked, ParameterGroup(own[2:], "thresholds")], config, recorded=recorded))
        parameters.append(own)
    return optimisers, parameters


def step_all(optimisers: list[Optimiser], parameters: list[list[nn.Parameter]], step: int, without: int = -1) -> None:
    for optimiser, own in zip(optimisers, parameters, strict=True):
        optimiser.lr = 0.05 / (1 + step)
        for k, (p, gradient) in enumerate(zip(own, draw(seed=100 + step), strict=True)):
            p.grad = None if k == without else gradient.to(p.device)
        optimiser.step()


def assert_same(optimisers: list[Optimiser], parameters: list[list[nn.Parameter]]) -> None:
    one, other = [[*own, *o.averages()] for own, o in zip(parameters, optimisers, strict=True)]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What waits for the device in each recorded step; to make a recording is to take a step, as on a GPU."""
    watched, found = watched_recording()
    monkeypatch.setattr("mmea_calc.fast.recorded_change.Recording", watched)
    return found


def test_recorded_steps_are_the_ordinary_ones_and_wait_for_nothing(recordings: list[set[str]]) -> None:
    optimisers, parameters = pair_of()
    n = 2 * FREQUENCY + 3
    for step in range(n):
        step_all(optimisers, parameters, step)
        assert_same(optimisers, parameters)
    # not the first, which makes bases, and the next two, which show that tensors stay; those with new bases are
    assert recordings == [set()] * (n - 3)


def test_recorded_steps_are_the_ordinary_ones_on_every_device(device: str) -> None:
    optimisers, parameters = pair_of(device=device)
    for step in range(2 * FREQUENCY + 3):
        step_all(optimisers, parameters, step)
        assert_same(optimisers, parameters)


def test_a_recorded_step_is_seen_by_those_who_keep_what_they_made_of_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    optimisers, parameters = pair_of()

    class Uncounted(Recording[None]):
        """As a graph, which counts nothing."""

        def __call__(self) -> None:
            with torch.autograd._unsafe_preserve_version_counter(tuple(parameters[1])):
                super().__call__()

    monkeypatch.setattr("mmea_calc.fast.recorded_change.Recording", Uncounted)
    for step in range(7):
        before = [p._version for p in parameters[1]]
        step_all(optimisers, parameters, step)
        assert step == 0 or all(p._version > v for p, v in zip(parameters[1], before, strict=True))


def test_steps_are_recorded_anew_when_other_tensors_take_part(recordings: list[set[str]]) -> None:
    optimisers, parameters = pair_of()
    for step in range(6):
        step_all(optimisers, parameters, step)
    assert len(recordings) == 3
    for step in range(6, 12):
        step_all(optimisers, parameters, step, without=1)
        assert_same(optimisers, parameters)
    assert len(recordings) == 7
    with torch.no_grad():
        for own in parameters:
            own[2].data = own[2].data.clone()
    for step in range(12, 16):
        step_all(optimisers, parameters, step, without=1)
        assert_same(optimisers, parameters)
    assert len(recordings) == 9
    state = copy.deepcopy(optimisers[0].state_dict())
    for step in range(16, 20):
        if step == 18:  # from where the first one was
            for optimiser, own in zip(optimisers, parameters, strict=True):
                optimiser.load_state_dict(copy.deepcopy(state))
                with torch.no_grad():
                    torch._foreach_copy_(list[Tensor](own), draw(seed=9))
        step_all(optimisers, parameters, step, without=1)
        assert_same(optimisers, parameters)
    assert len(recordings) == 11
    optimisers[1].close()
    step_all(optimisers, parameters, 20, without=1)
    assert_same(optimisers, parameters)
    assert len(recordings) == 11


def test_a_recording_that_does_nothing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmea_calc.fast.recorded_change.Recording", Nothing)
    optimisers, parameters = pair_of()
    for step in range(3):
        step_all(optimisers, parameters, step)
    with pytest.warns(UserWarning, match="optimiser are not recorded: what is recorded gives other results"):
        step_all(optimisers, parameters, 3)
    step_all(optimisers, parameters, 4)
    assert_same(optimisers, parameters)


def test_what_cannot_be_recorded_changes_nothing_and_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any, device: torch.device) -> None:
        function()
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr("mmea_calc.fast.recorded_change.Recording", refuse)
    optimisers, parameters = pair_of()
    for step in range(3):
        step_all(optimisers, parameters, step)
    with pytest.warns(UserWarning, match="optimiser are not recorded: out of memory$"):
        step_all(optimisers, parameters, 3)
    step_all(optimisers, parameters, 4)
    assert_same(optimisers, parameters)
