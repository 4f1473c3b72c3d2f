"""SD-card images: a base image plus artifacts and settings, built without root."""
