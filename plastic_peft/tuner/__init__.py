from .config import PlasticityConfig
from .layer import FullLayer
from .model import PlasticityModel
from .registration import register


__all__ = ["FullLayer", "PlasticityConfig", "PlasticityModel"]

register(PlasticityConfig, PlasticityModel)
