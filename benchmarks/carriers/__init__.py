"""What could carry a mask: four ways, tried on the rows of the host page that they decide, and timed."""
