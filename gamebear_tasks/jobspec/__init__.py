"""Jobs as pure data, and their digests."""
