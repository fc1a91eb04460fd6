"""What each path does: read the request, call core, shape the answer."""
