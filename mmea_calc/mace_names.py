"""The published MACE networks by name, and where mace-torch 0.3 keeps their files.

A name is one line of `PUBLISHED`. File names, addresses and the cache folder are mace-torch's own, so that a file
fetched by either is found by both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import BackboneError
from .mace_bridge import mace_calculators, quiet

MIT = "MIT"
ASL = "Academic Software License (no commercial use), https://github.com/gabor1/ASL"
_OFF = "wB97M-D3(BJ)/def2-TZVPPD"
_OFF_ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)
_OFF24 = "https://github.com/ACEsuit/mace-off/blob/main/mace_off24/MACE-OFF24_medium.model?raw=true"
_OMOL = "https://github.com/ACEsuit/mace-foundations/releases/download/mace_omol_0/MACE-omol-0-extra-large-1024.model"
_ANICC = "https://github.com/ACEsuit/mace/raw/main/mace/calculators/foundations_models/ani500k_large_CC.model"


@dataclass(frozen=True)
class Published:
    """One published network.

    Attributes:
        loader: mace-torch's function that offers it: `mace_off`, `mace_mp`, `mace_omol`, `mace_anicc`.
        argument: what that function takes for it.
        licence: of the weights.
        level_of_theory: of the data, where there is one for the whole network.
        elements: atomic numbers, where they are few; None for a table of most elements.
        head: the head that the loader chooses by itself.
    """

    loader: Literal["off", "mp", "omol", "anicc"]
    argument: str
    licence: str
    level_of_theory: str | None
    elements: tuple[int, ...] | None = None
    head: str | None = None


PUBLISHED: dict[str, Published] = {
    "mace-off23-small": Published("off", "small", ASL, _OFF, _OFF_ELEMENTS),
    "mace-off23-medium": Published("off", "medium", ASL, _OFF, _OFF_ELEMENTS),
    "mace-off23-large": Published("off", "large", ASL, _OFF, _OFF_ELEMENTS),
    "mace-off24-medium": Published("off", _OFF24, ASL, _OFF, _OFF_ELEMENTS),
    "mace-mp-0-small": Published("mp", "small", MIT, "PBE+U (MPtrj)"),
    "mace-mp-0-medium": Published("mp", "medium", MIT, "PBE+U (MPtrj)"),
    "mace-mp-0-large": Published("mp", "large", MIT, "PBE+U (MPtrj)"),
    "mace-mp-0b-small": Published("mp", "small-0b", MIT, "PBE+U (MPtrj)"),
    "mace-mp-0b-medium": Published("mp", "medium-0b", MIT, "PBE+U (MPtrj)"),
    "mace-mp-0b2-small": Published("mp", "small-0b2", MIT, "PBE+U (MPtrj)"),
    "mace-mp-0b2-medium": Published("mp", "medium-0b2", MIT, "PBE+U (MPtrj)"),
    "mace-mp-0b2-large": Published("mp", "large-0b2", MIT, "PBE+U (MPtrj)"),
    "mace-mp-0b3-medium": Published("mp", "medium-0b3", MIT, "PBE+U (MPtrj)"),
    "mace-mpa-0-medium": Published("mp", "medium-mpa-0", MIT, "PBE+U (MPtrj, sAlex)"),
    "mace-omat-0-small": Published("mp", "small-omat-0", ASL, "PBE+U (OMAT24)"),
    "mace-omat-0-medium": Published("mp", "medium-omat-0", ASL, "PBE+U (OMAT24)"),
    "mace-matpes-pbe-0": Published("mp", "mace-matpes-pbe-0", ASL, "PBE (MatPES)"),
    "mace-matpes-r2scan-0": Published("mp", "mace-matpes-r2scan-0", ASL, "r2SCAN (MatPES)"),
    "mace-omol-0": Published("omol", "extra_large", ASL, "wB97M-V/def2-TZVPD (OMol25)", head="omol"),
    "mace-mh-0": Published("mp", "mh-0", "see https://github.com/ACEsuit/mace-foundations", None),
    "mace-mh-1": Published("mp", "mh-1", "see https://github.com/ACEsuit/mace-foundations", None),
    "mace-anicc": Published("anicc", "", MIT, "CCSD(T) (ANI-1ccx)", (1, 6, 7, 8)),
}


def locate(name: str) -> tuple[Path, str]:
    """Where mace-torch keeps, or would put, the file of a published network, and where it comes from.

    Returns:
        path of the file, which may not exist; address.
    """
    mace_calculators()
    from mace.calculators import foundations_models as foundations
    from mace.tools.utils import get_cache_dir

    entry, cache = PUBLISHED[name], Path(get_cache_dir())
    if entry.loader == "anicc":
        return Path(foundations.module_dir) / "foundations_models" / _ANICC.rsplit("/", 1)[1], _ANICC
    if entry.loader == "mp":
        url = foundations.mace_mp_urls[entry.argument]
        bundled = Path(foundations.local_model_path)
        if entry.argument == "medium-mpa-0" and bundled.is_file():
            return bundled, url
        # mace-torch leaves everything but letters, digits and underscores out of these file names
        return cache / "".join(c for c in url.rsplit("/", 1)[1] if c.isalnum() or c == "_"), url
    url = foundations.mace_off_urls.get(entry.argument, entry.argument) if entry.loader == "off" else _OMOL
    return cache / url.rsplit("/", 1)[1].split("?")[0], url


def fetch(name: str) -> Path:
    """The file of a published network, downloaded by mace-torch if its cache lacks it.

    Raises:
        BackboneError: it is neither there nor can it be downloaded; says where to put it.
    """
    path, url = locate(name)
    if path.is_file():
        return path
    from mace.calculators import foundations_models as foundations

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with quiet():
            if PUBLISHED[name].loader == "mp":
                path = Path(foundations.download_mace_mp_checkpoint(PUBLISHED[name].argument))
            else:
                foundations._urlretrieve_with_timeout(url, str(path))
    except (OSError, RuntimeError) as problem:
        raise BackboneError(
            f"backbone {name!r} is not on this machine and could not be downloaded ({problem}); fetch {url} "
            f"elsewhere and put it at {path}, or give the path of a .model or .safetensors file instead"
        ) from problem
    if not path.is_file():
        raise BackboneError(f"mace-torch downloaded {name!r} but left no file at {path}")
    return path
