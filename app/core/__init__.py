"""What the service is. Knows neither HTTP nor a GPU; every process imports it."""
