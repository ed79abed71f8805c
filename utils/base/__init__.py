"""Ground floor: errors, signals, files, checkpoints, the torchvision import. Imports nothing of this project."""
