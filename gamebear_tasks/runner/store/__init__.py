"""The store on a builder: jobs, blobs, locks, slots."""
