"""Attack and defend federated learning; measure who can still do what, and what it costs."""

__version__ = "0.1.0"
