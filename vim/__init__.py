"""Vision Mamba: importing this package registers the families with timm.

>>> import timm, vim
>>> model = timm.create_model("vim_tiny")
"""

from . import models  # noqa: F401  (registers with timm)

__version__ = "0.3.0"
