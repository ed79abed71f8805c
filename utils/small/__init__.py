"""The small network: tracing, which channels are needed, cutting them out, counting multiply-adds."""
