"""Machine code of a traced network, in two files: found by what the network is, and opened with the values of one.

`form_of` names a program by all that its graph depends on. `build` makes NAME.pt2 (torch's inductor: C++ on a CPU,
Triton on a GPU) and NAME.safetensors (the order of its inputs, and constants that no network has by name). `Program`
opens the two and calls the code with the tensors of a network as they are at present.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import CompilationError, first_line
from ..mace_bridge import quiet
from .memory import keep_small_blocks
from .pair_radial import radial_forms
from .tracing import Traced, contraction_forms, place_of

PROGRAM_VERSION = 7
# Of a side of a tensor, such as pairs or atoms.
_LARGEST = 2**26


def program_folder() -> Path:
    """Where programs are kept."""
    return Path.home() / ".cache" / "mmea" / "programs"


def form_of(network: nn.Module, *asked: object) -> str:
    """sha256 (hex) of all that a graph depends on: modules of the network, their settings, shapes of its tensors.

    Values of tensors are not part of it. Plain attributes of modules are, whatever they are called: what a module
    decides by cannot be missed. `asked` tells graphs of one network apart.
    """
    parts: list[object] = [
        PROGRAM_VERSION,
        *asked,
        torch.__version__,
        metadata.version("mace-torch"),
        *_processor(network),
    ]
    for name, module in network.named_modules():
        settings = {key: value for key, value in vars(module).items() if _is_plain(value)}
        hooks = [type(h).__name__ for h in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
        form = type(module.__dict__.get("forward")).__qualname__
        parts.append((name, type(module).__qualname__, form, module.extra_repr(), sorted(settings.items()), hooks))
    parts += [(name, tuple(t.shape), str(t.dtype)) for name, t in named_tensors(network)]
    parts += [form.terms for form in contraction_forms(network)]  # of which values decide: those that are zero
    parts.append(tabled(network))  # likewise
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def tabled(network: nn.Module) -> list[bool]:
    """Which of the network's radial MLPs a program takes as tables."""
    return [form.table() is not None for form in radial_forms(network)]


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return isinstance(value, bool | int | float | str)  # None is often the place of something that comes and goes


def _processor(network: nn.Module) -> tuple[str, ...]:
    device = next(network.parameters()).device
    if device.type == "cuda":
        return "cuda", torch.cuda.get_device_name(device)
    return device.type, platform.machine(), torch.backends.cpu.get_cpu_capability()


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their names."""
    yield from network.named_parameters()
    yield from network.named_buffers()


class Program:
    """Compiled code and the names of the values that it takes after the tensors of a batch.

    Args:
        path: the two files without their endings.
        device: where it is to run.

    Attributes:
        names: of its values, in order.
        fixed: those of them that belong to no network.

    Raises:
        CompilationError: the files are not there, or not what they should be.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            with safetensors.safe_open(path.with_suffix(".safetensors"), framework="pt") as file:
                self.names: list[str] = json.loads(file.metadata()["inputs"])
                self.fixed = {key: file.get_tensor(key).to(device) for key in file.keys()}  # noqa: SIM118
            self._device = device
            with _current(device):  # opening makes its device the current one for good
                self._run = _load(path.with_suffix(".pt2"), device)
            if device.type == "cpu":
                keep_small_blocks()
        except Exception as problem:  # whatever a foreign or damaged file makes torch raise
            raise CompilationError(
                f"{path}.* cannot be opened ({problem}): remove these files, and compile again"
            ) from problem

    def values(self, known: Mapping[str, Tensor]) -> list[Tensor]:
        """The values in their order, from tensors by name."""
        return [(self.fixed[name] if name in self.fixed else known[name]).detach().contiguous() for name in self.names]

    def __call__(self, inputs: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """Results for the tensors of a batch."""
        # The code takes it that entries lie in their order, and looks at nothing but addresses.
        inputs = [t if t.is_contiguous() else t.contiguous() for t in inputs]
        with _current(self._device):  # its operations go to the stream of the current device
            return self._run([*inputs, *values])


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _load(path: Path, device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
    from torch._inductor import aoti_load_package

    # On a GPU without what keeps threads apart: its events are none that a CUDA graph can hold.
    _, _, number = str(device).partition(":")
    single = device.type == "cuda"
    package = aoti_load_package(str(path), run_single_threaded=single, device_index=int(number) if number else -1)
    # Below what torch gives to be called, which takes nested arguments apart at every call: ours are flat.
    return cast(Callable[[list[Tensor]], list[Tensor]], package.loader.boxed_run)


def build(traced: Traced, known: Mapping[str, Tensor], path: Path, *, one_block: bool = False) -> None:
    """Compile a graph and write the two files.

    Args:
        traced: the graph.
        known: tensors by name, of which those that it takes are given by their names.
        path: of the files, without their endings.
        one_block: take the memory for all that is made in between as one block, on a CPU. Allocating is a tenth of the
            time of a small call. For the gradient of a loss the block is larger than what is there at any time.
    """
    from torch._inductor import aoti_compile_and_package
    from torch.export import Dim, export

    of_place = {place_of(t): name for name, t in known.items()}
    names, fixed = [], {}
    for i, tensor in enumerate(traced.constants):
        name = of_place.get(place_of(tensor))
        if name is None:
            name = f"fixed.{i}"
            fixed[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        names.append(name)
    inputs = [t.contiguous() for t in (*traced.inputs, *traced.constants)]
    dynamic: list[set[int]] = [*traced.dynamic, *(set() for _ in traced.constants)]
    # On a GPU inductor counts with 32 bits unless told how large things may become, and judges by the example's size.
    on_gpu = any(t.device.type == "cuda" for t in inputs)
    any_size = Dim.AUTO(max=_LARGEST) if on_gpu else Dim.AUTO
    shapes = tuple(
        {d: any_size if d in which else Dim.STATIC for d in range(t.dim())}
        for t, which in zip(inputs, dynamic, strict=True)
    )
    with quiet():
        exported = export(_Flat(traced.graph), tuple(inputs), dynamic_shapes=(shapes,), strict=False)
        aoti_compile_and_package(
            exported,
            package_path=str(path.with_suffix(".pt2")),
            inductor_configs={
                "cpp.dynamic_threads": True,
                "assert_indirect_indexing": False,
                "memory_planning": one_block and not on_gpu,
            },
        )
    safetensors.torch.save_file(fixed, path.with_suffix(".safetensors"), metadata={"inputs": json.dumps(names)})


def path_of(network: nn.Module, *asked: object) -> Path:
    """Where the program of a form is, or would be, without endings."""
    return program_folder() / form_of(network, *asked)


def any_made() -> bool:
    """Whether there is any program at all: asked first, since naming one takes a tenth of a second and more."""
    return any(program_folder().glob("*.safetensors"))


@contextmanager
def being_made(path: Path) -> Iterator[Path]:
    """Where to `build` the program that is to be at `path`: it is moved there at the end of the context.

    Raises:
        CompilationError: for whatever is raised within the context; nothing is kept then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "program"
        try:
            yield made
        except CompilationError:
            raise
        except Exception as problem:  # inductor raises whatever its passes and the compiler raise
            raise CompilationError(
                f"this network cannot be compiled here ({type(problem).__name__}: {first_line(problem)[:200]}); "
                "a C++ compiler is needed (g++ or clang), for a GPU also CUDA's toolkit, and everything works without"
            ) from problem
        for ending in (".pt2", ".safetensors"):  # in this order: the second says that the first is whole
            made.with_suffix(ending).replace(path.with_suffix(ending))


def is_made(path: Path) -> bool:
    """Whether a program is there."""
    return path.with_suffix(".safetensors").is_file()


class _Flat(nn.Module):
    """What `torch.export` takes."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *inputs: Tensor) -> Any:
        return self.traced(*inputs)
