"""Files that jobs read and write: storage, Arrow files, Delta tables."""
