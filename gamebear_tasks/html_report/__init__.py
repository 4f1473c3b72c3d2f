"""HTML report of the last runs."""
