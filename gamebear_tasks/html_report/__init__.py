"""The last runs as an HTML page."""
