"""Data sets by reference: the bundled Fashion-MNIST, folders of images, and whatever timm can read."""

from se_prune.data.source import DataSource, Split, open_data

__all__ = ["DataSource", "Split", "open_data"]
