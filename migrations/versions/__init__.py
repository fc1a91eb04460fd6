"""One file a change, named by date and deed."""
