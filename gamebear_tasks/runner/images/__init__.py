"""Base images and package images."""
