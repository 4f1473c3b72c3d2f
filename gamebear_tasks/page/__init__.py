"""The page of the last runs: one HTML file that needs nothing else, neither network nor scripts."""
