"""Bodies and queries as they arrive, objects as they leave. Knows no database session."""
