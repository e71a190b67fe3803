"""Stand-alone self-attention for detectron2: backbones, FPN and RetinaNet heads.

``import sasa_det`` registers everything with detectron2's registries. ``sasa_det.ops`` and
``sasa_det.layers`` need torch only.
"""

import importlib.util
import warnings

__version__ = "0.1.0"

_INSTALL_HINT = (
    "sasa_det found no detectron2, so only sasa_det.ops and sasa_det.layers work; install "
    "detectron2 as sasa_det's README says under 'Install', from GitHub or from PyPI."
)

if importlib.util.find_spec("detectron2") is None:
    warnings.warn(_INSTALL_HINT, stacklevel=2)
else:
    from . import compat

    compat.fill_gaps()

    from . import modeling  # noqa: F401  (registers the models)
    from .config import add_sasa_config
    from .data import register_digits

    register_digits()

    __all__ = ["add_sasa_config"]
