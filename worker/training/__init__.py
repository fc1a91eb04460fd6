"""The training engine. Pure: no database, no queue, no settings."""
