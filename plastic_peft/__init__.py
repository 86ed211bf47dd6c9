"""plastic_peft: PEFT adapters on the modules that a measurement of your images selects.

Importing the package registers the method with PEFT.
"""

from .bounds import plasticity_bounds
from .components import Component, find_components
from .measure import measure_plasticity
from .report import PlasticityReport
from .selection import Selection
from .tuner import PlasticityConfig, PlasticityModel


__version__ = "0.1.0"

__all__ = [
    "Component",
    "PlasticityConfig",
    "PlasticityModel",
    "PlasticityReport",
    "Selection",
    "find_components",
    "measure_plasticity",
    "plasticity_bounds",
]
