"""Where steps run: in this process, or on many ranks."""
