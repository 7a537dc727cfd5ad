"""Published methods to compare with, one module each: ``from dlplora.baselines.arrow import Arrow``.

A wheel ships the modules in this folder. In a clone they lie in the top-level folder ``baselines/``, which this package then reads;
either way they have one name.
"""

from pathlib import Path

from dlplora.config import PACKAGE_ROOT

IN_CLONE: Path = PACKAGE_ROOT.parent / "baselines"

if not (Path(__file__).parent / "arrow.py").is_file():
    __path__.append(str(IN_CLONE))
