"""Stand-alone self-attention for detectron2: backbones, FPN and RetinaNet heads.

``import sasa_det`` registers everything with detectron2's registries. ``sasa_det.ops`` and
``sasa_det.layers`` need torch only.
"""

import warnings
from typing import Any

__version__ = "0.1.0"

try:
    from . import compat

    compat.fill_gaps()

    from . import modeling  # noqa: F401  (registers the models)
    from .config import add_sasa_config
    from .data import register_digits
except ModuleNotFoundError as error:
    _hint = (
        f"sasa_det found no {error.name}, so only sasa_det.ops and sasa_det.layers work here; "
        "install detectron2 and what it needs as the README says under Install."
    )
    warnings.warn(_hint, stacklevel=2)

    def __getattr__(name: str) -> Any:
        if name == "add_sasa_config":
            raise ImportError(_hint)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
else:
    register_digits()

    __all__ = ["add_sasa_config"]
