"""The `luthier` command: what an operator types. Knows the service and its processes; nothing imports it."""
