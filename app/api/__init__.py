"""The HTTP side: routes, schemas, errors and streams. Knows no GPU code; reaches workers by message."""
