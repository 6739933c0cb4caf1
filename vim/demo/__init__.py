"""A local web page to try a classifier: drop an image, see classes, maps and nearest neighbours."""

from .app import serve
from .config import DemoConfig
from .predict import Answer, Predictor

__all__ = ["Answer", "DemoConfig", "Predictor", "serve"]
