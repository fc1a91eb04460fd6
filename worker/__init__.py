"""The processes that validate, train and serve; the only code that touches a device."""
