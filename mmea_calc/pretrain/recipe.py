"""The whole recipe of an embedded backbone, from a broad and cheap set and a small and better one, in one call.

| folder or file | what | made by |
|---|---|---|
| `differences/` | the better set's labels minus the cheap ones | `relabel.differences` |
| `difference/` | a network of these | `train.pretrain` |
| `relabelled/` | many structures of the broad set with its estimate added; the better set; walls | `relabel.relabel` |
| `wide/` | the start in a network of more channels, where these are asked for | `widen.widen` |
| `broad/` | the long stage, on these | `train.pretrain` |
| `mixed/` | fewer and other structures, likewise | `relabel.relabel` |
| `last/` | the last stage, on these, with a wall in every batch | `train.pretrain` |
| NAME.safetensors | the mean of the weights before and after the last stage | `average.average` |

What is there is not made again, and a stage that was interrupted goes on: the same call resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config import DEFAULT_BACKBONE
from ..errors import DataError, TrainingError
from ..files import alone_in, json_ready, write_text
from ..md import open_potential
from .average import average
from .relabel import differences, relabel
from .train import PretrainConfig, check_stage, pretrain
from .widen import widen

_RECORD = "recipe.json"


@dataclass(frozen=True)
class RecipeConfig:
    """How a backbone is made.

    Attributes:
        start: backbone that the broad stage starts from, name or path.
        difference_start: backbone that the network of differences starts from: one of the cheap level.
        difference_scale: what its readouts are multiplied by first; 1 for a network of differences.
        n_broad, n_mixed: structures of the broad set that are relabelled for the broad stage and for the last one.
        channels: what the start is widened to before the broad stage (`widen`); None leaves it as it is.
        minutes_difference, minutes_broad, minutes_last: length of the stages.
        lr: largest learning rate of the broad stage; that of the last one is 0.8 times as large.
        steps: steps of every stage in the place of minutes.
        batch_size, seed, device, compile: as for `PretrainConfig`; the seed is that of the draws as well.
    """

    start: str = DEFAULT_BACKBONE
    difference_start: str = "mmea-organic-s2-xtb"
    difference_scale: float = 0.1
    n_broad: int = 90_000
    n_mixed: int = 10_700
    channels: int | None = None
    minutes_difference: float = 14.0
    minutes_broad: float = 70.0
    minutes_last: float = 11.0
    lr: float = 0.0025
    steps: int | None = None
    batch_size: int = PretrainConfig.batch_size
    seed: int = 0
    device: str = "auto"
    compile: bool = True

    def _stage(self, minutes: float, lr: float) -> PretrainConfig:
        """What all stages share."""
        return PretrainConfig(
            minutes=minutes,
            steps=self.steps,
            lr=lr,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            compile=self.compile,
        )

    def difference(self) -> PretrainConfig:
        return replace(self._stage(self.minutes_difference, 0.002), readout_scale=self.difference_scale)

    def broad(self) -> PretrainConfig:
        """Energies weigh more than by default: the start has learnt the forces."""
        return replace(self._stage(self.minutes_broad, self.lr), energy_weight=40.0, late_energy_weight=100.0)

    def last(self) -> PretrainConfig:
        return replace(self._stage(self.minutes_last, 0.8 * self.lr), energy_weight=40.0, late_energy_weight=100.0)


def make_backbone(
    *,
    better: Path,
    cheap: Path,
    out: Path,
    name: str,
    config: RecipeConfig | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Make a backbone, or go on with making it.

    Args:
        better: packed set at the wanted level with the cheap one's labels beside, and `walls.npz` (data/pbe).
        cheap: packed set at the cheap level.
        out: folder of everything in between, and of the result.
        name: of the backbone.
        config: how.
        progress: called with a line of text now and then.

    Returns:
        path of the backbone.

    Raises:
        DataError: a set cannot be used, or there are no walls. BackboneError: a start cannot be loaded. TrainingError:
            settings that cannot be, or the folder was begun with others, or another process is at work in it, or a
            loss is not finite.
    """
    config = config or RecipeConfig()
    for stage in (config.difference(), config.broad(), config.last()):
        check_stage(stage, name)
    if not (walls := better / "walls.npz").is_file():
        raise DataError(f"there is no {walls}: make it with `mmea pretrain walls --out {walls}`")
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out, TrainingError):
        _check_record(out / _RECORD, {"name": name, **asdict(config)})
        return _Recipe(better, cheap, out, name, config, progress).make()


def _check_record(path: Path, wanted: dict[str, object]) -> None:
    """Keep what the folder is made with, or hold it against what was kept."""
    if not path.exists():
        write_text(path, json.dumps(json_ready(wanted), indent=1) + "\n")
        return
    kept = json.loads(path.read_text())
    if other := [f"{k} {kept.get(k)!r}, not {v!r}" for k, v in wanted.items() if kept.get(k) != v]:
        raise TrainingError(
            f"{path.parent} was begun with {'; '.join(other)}: ask for the same, or give another folder"
        )


@dataclass(frozen=True)
class _Recipe:
    better: Path
    cheap: Path
    out: Path
    name: str
    config: RecipeConfig
    progress: Callable[[str], None]

    def make(self) -> Path:
        made = self.out / f"{self.name}.safetensors"
        if made.exists():
            return made
        data = self._folder("differences", lambda to: differences(data=self.better, cheap=self.cheap, out=to))
        by = self._trained("difference", data, self.config.difference_start, self.config.difference())
        data = self._folder("relabelled", lambda to: self._relabel(by, to, self.config.n_broad, walls=True))
        broad = self._trained("broad", data, self._start(), self.config.broad())
        data = self._folder("mixed", lambda to: self._relabel(by, to, self.config.n_mixed, walls=False))
        last = self._trained("last", data, str(broad), self.config.last(), walls=self.better / "walls.npz")
        average([broad, last], made)
        return made

    def _start(self) -> str:
        """What the broad stage starts from, which is written where it has more channels than the given one."""
        if self.config.channels is None:
            return self.config.start
        return str(self._folder("wide", self._widen) / "wide.safetensors")

    def _widen(self, to: Path) -> None:
        assert self.config.channels is not None
        to.mkdir()
        widen(self.config.start, self.config.channels, to / "wide.safetensors", seed=self.config.seed)

    def _folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder that is complete or absent."""
        folder, part = self.out / name, self.out / f".{name}.part"
        if not folder.exists():
            self.progress(name)
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(folder)
        return folder

    def _trained(self, name: str, data: Path, start: str, settings: PretrainConfig, walls: Path | None = None) -> Path:
        folder = self.out / name
        made = folder / f"{name}.safetensors"
        if not made.exists():
            self.progress(name)
            resume = (folder / "resume.pt").exists()
            pretrain(
                data=data,
                out=folder,
                name=name,
                start=start,
                walls=walls,
                resume=resume,
                settings=settings,
                progress=self.progress,
            )
        return made

    def _relabel(self, by: Path, to: Path, number: int, *, walls: bool) -> None:
        """Draws of the two stages differ: the second one's seed is the next."""
        relabel(
            data=self.cheap,
            by=open_potential(str(by), device=self.config.device),
            beside=self.better,
            out=to,
            number=number,
            seed=self.config.seed + (0 if walls else 1),
            progress=self.progress,
        )
        if walls:
            shutil.copyfile(self.better / "walls.npz", to / "train-2.npz")


__all__ = ["RecipeConfig", "make_backbone"]
