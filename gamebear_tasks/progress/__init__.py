"""Progress of a run: events, the model that they update, and its views."""
