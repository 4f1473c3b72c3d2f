"""Progress of a run: events, the model they build up, and its views."""
