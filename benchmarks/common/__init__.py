"""What every benchmark measures with, and how its figures are kept."""
