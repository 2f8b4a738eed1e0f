"""digitnet: train an image classifier properly in PyTorch Lightning, on handwritten digits."""

__version__ = "0.1.0"
