"""Which models of timm, torchvision and transformers the package carries."""
