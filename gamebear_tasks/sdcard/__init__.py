"""SD-card images: a base plus artifacts and settings, baked without root."""
