"""Own and published results side by side."""
