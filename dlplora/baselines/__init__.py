"""Published methods to compare with, one module each: ``from dlplora.baselines.arrow import Arrow``.

A wheel contains the modules in this folder. In a clone this package reads them from the top-level folder ``baselines/``. Import names are
the same in both cases.
"""

from pathlib import Path

from dlplora.config import PACKAGE_ROOT

IN_CLONE: Path = PACKAGE_ROOT.parent / "baselines"

if not (Path(__file__).parent / "arrow.py").is_file():
    __path__.append(str(IN_CLONE))
