"""What a command is given by name: models, weights, images."""

from torch_flowprune.cli.sources.checkpoints import existing
from torch_flowprune.cli.sources.image_folder import ImageOptions, image_loader
from torch_flowprune.cli.sources.named_models import example_input, load_model

__all__ = ["ImageOptions", "example_input", "existing", "image_loader", "load_model"]
