"""The serving engine. Pure: no database, no queue, no settings."""
