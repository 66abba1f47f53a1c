"""What each measure does to a trained net."""
